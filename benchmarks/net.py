#!/usr/bin/env python3
"""Sealed network links beside the same path without crypto, and beside OpenVPN.

    benchmarks/net.py [--rounds 5] [--seconds 5] [--mtu 1500] [--mtu 9000] [--out NAME]

Two network namespaces on this machine, a cable between them, and in each a TAP device of the side
whose turn it is. Sides alternate, so that other load on the machine meets all of them; a figure is
the median of the rounds, a ratio the median of each round's ratio. All sides have the same MTU on
the TAP and on the cable. `cable` is the cable alone, without any program: what the machine can do.

Writes benchmarks/results/NAME.json and NAME.md. As root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import HERE, PYTHON, ROOT, Failed, cpu_seconds, environment, run, version_of, wait_for

sys.path.insert(0, str(ROOT / "tests"))
sys.path.insert(0, str(ROOT))

from net_support import LiveHost, allow, two_hosts

from sealfs.net.frame import guest_mtu

TAP, PORT = "tap0", 7400
OPENVPN = (
    "--dev-type tap --dev tap0 --proto udp --port 7400 --mssfix 0 --verb 1 --persist-tun "
    "--data-ciphers AES-256-GCM --ca {dir}/ca.crt --cert {dir}/host.crt --key {dir}/host.key "
    "--sndbuf 4194304 --rcvbuf 4194304 --txqueuelen 1000"
)
Hosts = tuple[LiveHost, LiveHost]
Side = Callable[[Hosts, int], contextlib.AbstractContextManager[tuple[str, list[int]]]]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure: its unit, whether more is better, and how it is taken."""

    name: str
    title: str
    unit: str
    is_rate: bool
    measure: Callable[[Hosts, str, float], float]


def throughput(hosts: Hosts, address: str, seconds: float, *options: str) -> float:
    """Return Mbit/s as the receiver saw it."""
    a, b = hosts
    with b.background("iperf3", "-s", "-1", "-B", address):
        wait_for(lambda: f"{address}:5201" in b.run("ss", "-Hlnt"), "iperf3")
        said = json.loads(
            a.run("iperf3", "-J", "-c", address, "-t", int(seconds), "-O", 1, *options)
        )
    return float(said["end"]["sum_received"]["bits_per_second"]) / 1e6


def latency(hosts: Hosts, address: str, seconds: float) -> float:
    """Return the median round trip in microseconds, pings 5 ms apart."""
    said = hosts[0].run("ping", "-n", "-i", 0.005, "-c", int(seconds * 200), address)
    return statistics.median(float(t) for t in re.findall(r"time=([\d.]+) ms", said)) * 1000


ROWS = (
    Row("tcp", "TCP, one stream", "Mbit/s", True, throughput),
    Row("tcp-4", "TCP, four streams", "Mbit/s", True,
        lambda hosts, address, seconds: throughput(hosts, address, seconds, "-P", "4")),
    Row("both", "TCP, both ways at once, sum of one", "Mbit/s", True,
        lambda hosts, address, seconds: throughput(hosts, address, seconds, "--bidir")),
    Row("latency", "ping, median round trip", "us", False, latency),
)  # fmt: skip


# The sides: each leaves TAP devices up, with addresses, and takes them away.


@contextlib.contextmanager
def addressed(hosts: Hosts, mtu: int) -> Iterator[str]:
    """Give both TAP devices addresses; yield the one to measure to."""
    for number, host in enumerate(hosts, 1):
        wait_for(lambda host=host: TAP in host.run("ip", "link"), TAP)  # type: ignore[misc]
        host.run("ip", "address", "replace", f"10.1.0.{number}/24", "dev", TAP)
        host.run("ip", "link", "set", TAP, "up", "mtu", mtu)
    wait_for(lambda: hosts[0].ping("10.1.0.2", count=1) == 1, "the link")
    yield "10.1.0.2"


@contextlib.contextmanager
def cable(hosts: Hosts, mtu: int) -> Iterator[tuple[str, list[int]]]:
    """No program: the namespaces' cable alone."""
    yield "10.0.0.2", []


@contextlib.contextmanager
def relay(hosts: Hosts, mtu: int) -> Iterator[tuple[str, list[int]]]:
    """The same path, no crypto."""
    with contextlib.ExitStack() as undo:
        pids = [
            undo.enter_context(
                host.background(
                    PYTHON, HERE / "net_relay.py", TAP, f"10.0.0.{number}:{PORT}",
                    f"10.0.0.{3 - number}:{PORT}",
                )
            )
            for number, host in enumerate(hosts, 1)
        ]  # fmt: skip
        yield undo.enter_context(addressed(hosts, mtu)), pids


@contextlib.contextmanager
def sealfs(hosts: Hosts, mtu: int) -> Iterator[tuple[str, list[int]]]:
    """The service, one attachment on each host."""
    for number, host in enumerate(hosts, 1):
        allow(host, f"vm{number}")
        host.attach(
            f"vm{number}", port={"tap": TAP}, link={"listen": f"10.0.0.{number}:{PORT}"},
            peers=[f"10.0.0.{3 - number}:{PORT}"],
        )  # fmt: skip
    try:
        with addressed(hosts, mtu) as address:
            yield address, [host.service.pid for host in hosts if host.service]
    finally:
        for number, host in enumerate(hosts, 1):
            host.detach(f"vm{number}")


@contextlib.contextmanager
def openvpn(hosts: Hosts, mtu: int) -> Iterator[tuple[str, list[int]]]:
    """OpenVPN with TLS and AES-256-GCM, point to point."""
    with contextlib.ExitStack() as undo:
        pids = []
        for number, host in enumerate(hosts, 1):
            role = ["--tls-client"] if number == 1 else ["--tls-server", "--dh", "none"]
            words = OPENVPN.format(dir=host.directory).split()
            pids.append(
                undo.enter_context(
                    host.background(
                        "openvpn", *words, "--tun-mtu", mtu, "--local", f"10.0.0.{number}",
                        "--remote", f"10.0.0.{3 - number}", *role,
                    )
                )
            )  # fmt: skip
        yield undo.enter_context(addressed(hosts, mtu)), pids


SIDES = {"cable": cable, "relay": relay, "openvpn": openvpn, "sealfs": sealfs}


def make_certificates(hosts: Hosts) -> None:
    """Give both hosts what OpenVPN authenticates with."""
    place = hosts[0].directory
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run(
        "openssl", "req", "-x509", *key, "-keyout", place / "ca.key", "-out", place / "ca.crt",
        "-days", "2", "-subj", "/CN=benchmark",
    )  # fmt: skip
    for number, host in enumerate(hosts, 1):
        request = host.directory / "host.csr"
        run(
            "openssl", "req", *key, "-keyout", host.directory / "host.key", "-out", request,
            "-subj", f"/CN=host{number}",
        )  # fmt: skip
        run(
            "openssl", "x509", "-req", "-in", request, "-CA", place / "ca.crt", "-CAkey",
            place / "ca.key", "-CAcreateserial", "-out", host.directory / "host.crt", "-days", "2",
        )  # fmt: skip
    (hosts[1].directory / "ca.crt").write_bytes((place / "ca.crt").read_bytes())


def measured(
    hosts: Hosts, mtu: int, row: Row, side: Side, seconds: float, tries: int = 3
) -> tuple[float, float]:
    """Return one figure and the CPU seconds of both ends; a run that got stuck is done again."""
    while True:
        tries -= 1
        try:
            with side(hosts, mtu) as (address, pids):
                before = [cpu_seconds(pid) for pid in pids]
                value = row.measure(hosts, address, seconds)
                spent = [cpu_seconds(p) - b for p, b in zip(pids, before, strict=True)]
                return value, sum(spent)
        except (subprocess.TimeoutExpired, AssertionError):
            if not tries:
                raise


def measure(hosts: Hosts, mtu: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return the figures of every row, side and round."""
    found = []
    for number in range(rounds):
        for row in ROWS:
            for name, side in SIDES.items():
                value, spent = measured(hosts, mtu, row, side, seconds)
                figure = {
                    "round": number, "row": row.name, "side": name, "value": value,
                    "cpu_seconds": spent,
                }  # fmt: skip
                found.append(figure)
                print(f"{number} {row.name:10} {name:8} {value:12.1f} {row.unit}", flush=True)
    return found


def summary(figures: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return, for each row, the median of each side and sealfs's median ratios to the others."""
    found: dict[str, dict[str, Any]] = {}
    for row in ROWS:
        rounds: dict[int, dict[str, float]] = {}
        for figure in figures:
            if figure["row"] == row.name:
                rounds.setdefault(figure["round"], {})[figure["side"]] = figure["value"]
        medians = {side: statistics.median(r[side] for r in rounds.values()) for side in SIDES}
        ratios = {
            side: statistics.median(
                r["sealfs"] / r[side] if row.is_rate else r[side] / r["sealfs"]
                for r in rounds.values()
            )
            for side in SIDES
            if side != "sealfs"
        }
        found[row.name] = {"unit": row.unit, "medians": medians, "ratios": ratios}
    return found


def table(about: dict[str, Any], summaries: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the report in Markdown."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    for mtu, rows in summaries.items():
        lines += [
            "", f"## Cable with an MTU of {mtu}", "",
            "| row | cable | relay, no crypto | OpenVPN | sealfs | of the relay | of OpenVPN |",
            "|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in ROWS:
            one = rows[row.name]
            medians = " | ".join(f"{one['medians'][side]:,.0f}" for side in SIDES)
            ratios = f"{one['ratios']['relay']:.2f} | {one['ratios']['openvpn']:.2f}"
            lines.append(f"| {row.title}, {row.unit} | {medians} | {ratios} |")
    lines += [
        "",
        "Ratios above 1 are in sealfs's favour, also for latency. Must, for TCP at an MTU of",
        "1500: 0.4 of the relay and 0.5 of OpenVPN; stretch: 1.0 of OpenVPN.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--mtu", type=int, action="append", help="of the cable; may be repeated")
    parser.add_argument("--out", default="net", help="name of the files in results/")
    options = parser.parse_args()
    about = {
        **environment(),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "openvpn": version_of("openvpn", "--version"),
        "openvpn options": OPENVPN.format(dir="..."),
        "iperf3": version_of("iperf3", "--version"),
    }
    figures, summaries = {}, {}
    for mtu in options.mtu or [1500, 9000]:
        with (
            tempfile.TemporaryDirectory(prefix="sealfs-net-") as scratch,
            two_hosts(Path(scratch), mtu=mtu) as hosts,
        ):
            make_certificates(hosts)
            inner = guest_mtu(mtu, 28)
            figures[str(mtu)] = measure(hosts, inner, options.rounds, options.seconds)
        summaries[str(mtu)] = summary(figures[str(mtu)])
    out = HERE / "results" / options.out
    document = {"about": about, "summary": summaries, "figures": figures}
    out.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    text = table(about, summaries)
    out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except (Failed, subprocess.SubprocessError) as exc:
        sys.exit(f"net.py: {exc}")
