"""Worker threads for what waits for the disk or the cipher, and the driver of steps generators.

Knows nothing of FUSE or images: it runs zero-argument callables in threads and resumes the trio
task that asked. `trio.to_thread.run_sync` costs 145 us a round trip, a queue and an eventfd 86 us
(measured); the results of several threads are collected with one wake-up.

Concurrency: `run` and `drive` are called by any task of the trio thread. `_done` is appended to
by the worker threads and emptied by the `collect` task alone; a deque's append and popleft are
atomic. `_signalled` may be seen stale by a worker in one direction only: the collector clears it
before it empties the deque, so a result appended after that always writes the eventfd.
Work that has begun cannot be recalled: `run` is not cancellable, therefore neither is `drive`, and
a steps generator is never abandoned between two of its steps.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import outcome
import trio

from sealfs.image.steps import Steps, Work

T = TypeVar("T")

WORKER_COUNT = 16  # cold reads in flight, where there is no io_uring for them


class Workers:
    """A fixed set of threads, started at once and ended by `close`."""

    def __init__(self, count: int = WORKER_COUNT) -> None:
        self.wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._queue: SimpleQueue[tuple[Work, trio.lowlevel.Task | None] | None] = SimpleQueue()
        self._done: deque[tuple[trio.lowlevel.Task, outcome.Outcome[Any]]] = deque()
        self._signalled = False
        self.busy_count = 0
        """Pieces of work under way: they want the interpreter too."""
        self._threads = [
            threading.Thread(target=self._work, name=f"sealfs-worker-{index}", daemon=True)
            for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    async def run(self, work: Callable[[], T], *, is_background: bool = False) -> T:
        """Run `work` in a thread and return its result, or raise what it raised.

        Work in the background is not counted as busy: the lane spins beside it.
        """
        self.busy_count += not is_background
        self._queue.put((work, trio.lowlevel.current_task()))
        try:
            result: T = await trio.lowlevel.wait_task_rescheduled(_refuse_cancel)
        finally:
            self.busy_count -= not is_background
        return result

    def post(self, work: Work) -> None:
        """Have `work` done in a thread; it tells nobody and raises nothing."""
        self._queue.put((work, None))

    async def drive(self, steps: Steps[T], *, is_background: bool = False) -> T:
        """Run a steps generator to its end and return its result.

        The generator's own code runs here, in the trio thread; the work it yields runs in a
        thread, and what the work raises is thrown into the generator.
        """
        try:
            work = next(steps)
            while True:
                try:
                    result = await self.run(work, is_background=is_background)
                except Exception as exc:  # the generator decides what the failure means
                    work = steps.throw(exc)
                else:
                    work = steps.send(result)
        except StopIteration as stop:
            value: T = stop.value
            return value

    async def collect(self) -> None:
        """Resume tasks whose work is done; one task of this runs as long as `run` is used."""
        while True:
            await trio.lowlevel.wait_readable(self.wake_fd)
            os.eventfd_read(self.wake_fd)
            self._signalled = False
            while self._done:
                task, result = self._done.popleft()
                trio.lowlevel.reschedule(task, result)

    def close(self) -> None:
        """End the threads; nothing may be running any more."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self.wake_fd)

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            work, task = job
            if task is None:
                work()
                del work, job
                continue
            result: outcome.Outcome[Any] = outcome.capture(work)
            # Let go of the work's buffers and keys now, not when the next work arrives.
            del work, job
            self._done.append((task, result))
            del task, result
            if not self._signalled:
                self._signalled = True
                os.eventfd_write(self.wake_fd, 1)


def _refuse_cancel(_: Any) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
