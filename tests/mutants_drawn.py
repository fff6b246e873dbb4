"""Draw mutants: small changes of the syntax tree of a module, by seed.

A *site* is a place in a function's body together with what is put there instead. All sites of the
modules are listed in the order of their source, and a seed draws from them. Places where nothing
can be wrong are no sites: docstrings, annotations, decorators, assertions, names of types, and
the texts and arguments of errors.

A site's name is made of what it changes, not of line numbers, so that it outlives other edits:

    journal.py Journal.place: page + page_count > self.page_count => page + page_count >= ...
"""

from __future__ import annotations

import ast
import copy
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILES = ("journal.py", "tree.py", "image.py")
"""Of sealfs/image."""

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
}

_SYMMETRIC = ("min", "max", "same_mac")
"""Functions that do not care for the order of their arguments."""

Change = Callable[[ast.AST], ast.AST]
"""Makes the new node of a copy of the old one."""


@dataclass(frozen=True)
class Site:
    """One place, and what is put there."""

    file: str
    number: int
    """Of the node, in the order of `ast.walk` over the module."""
    change: Change
    name: str


def sites_of(file: str, source: str) -> list[Site]:
    """List everything that can be changed in a module, in the order of its source."""
    tree = ast.parse(source)
    numbers = {id(node): number for number, node in enumerate(ast.walk(tree))}
    found: list[Site] = []
    names: Counter[str] = Counter()
    for function, node in _nodes(tree, ""):
        for change in _changes(node):
            old, new = _shown(node), _shown(change(copy.deepcopy(node)))
            if old == new:
                continue
            name = f"{file} {function}: {old} => {new}"
            names[name] += 1
            if names[name] > 1:
                name += f" #{names[name]}"
            found.append(Site(file, numbers[id(node)], change, name))
    return found


def mutated(source: str, site: Site) -> str:
    """Return the module's source with one site changed."""
    tree = ast.parse(source)
    node = next(node for number, node in enumerate(ast.walk(tree)) if number == site.number)
    new = ast.copy_location(site.change(copy.deepcopy(node)), node)

    class Replace(ast.NodeTransformer):
        def visit(self, other: ast.AST) -> ast.AST:
            return new if other is node else self.generic_visit(other)

    return ast.unparse(ast.fix_missing_locations(Replace().visit(tree))) + "\n"


def draw(room: Path, seed: int, count: int) -> list[Site]:
    """Draw so many sites of the modules in `room`."""
    sites = [site for file in FILES for site in sites_of(file, (room / file).read_text())]
    drawn = random.Random(seed).sample(sites, min(count, len(sites)))
    return sorted(drawn, key=sites.index)


def _shown(node: ast.AST) -> str:
    text = ast.unparse(node).strip()
    first, *rest = text.splitlines()
    return f"{first} ..." if rest else first


def _nodes(parent: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield (name of the function, node) for all that may be changed."""
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield from _nodes(node, f"{function}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            for each in node.body:
                yield from _inside(each, f"{function}{node.name}")


def _inside(node: ast.AST, function: str) -> Iterator[tuple[str, ast.AST]]:
    if isinstance(node, ast.FunctionDef):
        for each in node.body:
            yield from _inside(each, f"{function}.{node.name}")
        return
    if isinstance(node, ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return  # a docstring
    yield function, node
    if isinstance(node, ast.Raise):
        return  # which error it is, and its text
    for name, child in ast.iter_fields(node):
        if name == "annotation" or (name == "type" and isinstance(node, ast.ExceptHandler)):
            continue
        for each in child if isinstance(child, list) else [child]:
            if isinstance(each, ast.AST):
                yield from _inside(each, function)


def _changes(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare(ops=[op]):
            for kind in _COMPARISONS.get(type(op), ()):
                yield _with(ops=[kind()])
        case ast.BoolOp(op=op, values=values):
            yield _with(op=ast.Or() if isinstance(op, ast.And) else ast.And())
            for at in range(len(values)):
                yield _without(at)
        case ast.UnaryOp(op=ast.Not()):
            yield _operand
        case ast.BinOp(op=op):
            if type(op) in _ARITHMETIC:
                yield _with(op=_ARITHMETIC[type(op)]())
        case ast.Constant(value=bool(value)):
            yield _with(value=not value)
        case ast.Constant(value=value) if isinstance(value, int):
            yield _with(value=value + 1)
            if value:
                yield _with(value=value - 1)
        case ast.If() | ast.While() | ast.IfExp():
            yield _negated
        case ast.Return(value=value) if value is not None and not _is_none(value):
            yield _with(value=ast.Constant(None))
        case ast.Break():
            yield lambda new: ast.Continue()
        case ast.Continue():
            yield lambda new: ast.Break()
        case ast.Call(args=[first, second, *_]) if ast.dump(first) != ast.dump(second):
            is_starred = isinstance(first, ast.Starred) or isinstance(second, ast.Starred)
            if not is_starred and ast.unparse(node.func) not in _SYMMETRIC:
                yield _swapped
    if isinstance(node, ast.Expr | ast.Assign | ast.AugAssign | ast.Raise | ast.Delete):
        yield lambda new: ast.Pass()
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        yield lambda new: ast.Pass()


def _is_none(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is None


def _with(**fields: object) -> Change:
    def change(node: ast.AST) -> ast.AST:
        for name, value in fields.items():
            setattr(node, name, value)
        return node

    return change


def _without(at: int) -> Change:
    def change(node: ast.AST) -> ast.AST:
        assert isinstance(node, ast.BoolOp)
        del node.values[at]
        return node if len(node.values) > 1 else node.values[0]

    return change


def _operand(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.UnaryOp)
    return node.operand


def _negated(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.If | ast.While | ast.IfExp)
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def _swapped(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.Call)
    node.args[:2] = node.args[1::-1]
    return node
