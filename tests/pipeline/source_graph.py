"""What a stage's code reaches, read from the source: functions it calls and settings it reads.

A name that a reached function mentions counts as reached, so this errs on the side of too much.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("pipeline", "edge_runtime")


@dataclass(frozen=True)
class Definition:
    """A function or class at the top of a module."""

    module: str
    name: str


@dataclass(frozen=True)
class Module:
    definitions: dict[str, ast.FunctionDef | ast.ClassDef]
    imports: dict[str, tuple[str, str | None]]


def module_file(name: str) -> Path | None:
    path = ROOT.joinpath(*name.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def reached(module: str, name: str = "run") -> set[Definition]:
    """Every definition of this project that ``module.name`` may call, itself included."""
    found: set[Definition] = set()
    waiting = [Definition(module, name)]
    while waiting:
        here = waiting.pop()
        if here in found:
            continue
        found.add(here)
        waiting += _mentioned(here)
    return found


def settings_read(definition: Definition) -> set[str]:
    """Paths of the configuration, as ``distill.steps``, that a function reads through its run or config parameter."""
    node = _module(definition.module).definitions[definition.name]
    if not isinstance(node, ast.FunctionDef):
        return set()
    roots = {}
    for argument in node.args.args:
        kind = ast.unparse(argument.annotation) if argument.annotation else ""
        if kind in ("StageRun", "Config"):
            roots[argument.arg] = ("run",) if kind == "StageRun" else ("run", "config")
    aliased = _aliases(node, roots)
    chains = [chain for use in ast.walk(node) if use not in aliased and (chain := _chain(use, roots)) is not None]
    whole = {chain for chain in chains if not any(_longer(other, chain) for other in chains)}
    return {_setting(chain) for chain in whole} - {""}


def _mentioned(here: Definition) -> Iterator[Definition]:
    module = _module(here.module)
    node = module.definitions[here.name]
    known = module.imports | _imports(node)
    own = {use.arg for use in ast.walk(node) if isinstance(use, ast.arg)}  # parameters hide what they are named after
    for use in ast.walk(node):
        if isinstance(use, ast.Name) and use.id not in own:
            if use.id in module.definitions:
                yield Definition(here.module, use.id)
            elif use.id in known:
                yield from _imported(*known[use.id])
        elif isinstance(use, ast.Attribute) and isinstance(use.value, ast.Name) and use.value.id in known:
            source, name = known[use.value.id]
            yield from _imported(f"{source}.{name}" if name else source, use.attr)


def _imported(source: str, name: str | None) -> Iterator[Definition]:
    if name is not None and module_file(source) is not None and name in _module(source).definitions:
        yield Definition(source, name)


@cache
def _module(name: str) -> Module:
    file = module_file(name)
    assert file is not None, name
    tree = ast.parse(file.read_text(encoding="utf-8"))
    definitions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    outside = ast.Module([node for node in tree.body if node not in definitions.values()], [])
    return Module(definitions, _imports(outside))


def _imports(tree: ast.AST) -> dict[str, tuple[str, str | None]]:
    found: dict[str, tuple[str, str | None]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return found


def _aliases(node: ast.FunctionDef, roots: dict[str, tuple[str, ...]]) -> set[ast.AST]:
    """Learn ``data = run.config.data`` (also in tuples) into ``roots``; the right sides are no uses of their own."""
    sides: set[ast.AST] = set()
    for assign in [use for use in ast.walk(node) if isinstance(use, ast.Assign)]:
        target, value = assign.targets[0], assign.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            starred = any(isinstance(side, ast.Starred) for side in (*target.elts, *value.elts))
            pairs = [] if starred else list(zip(target.elts, value.elts, strict=True))
        for left, right in pairs:
            if isinstance(left, ast.Name) and (chain := _chain(right, roots)) is not None:
                roots[left.id] = chain
                sides |= set(ast.walk(right))
    return sides


def _chain(node: ast.AST, roots: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    if isinstance(node, ast.Name):
        return roots.get(node.id)
    if isinstance(node, ast.Attribute) and (base := _chain(node.value, roots)) is not None:
        return (*base, node.attr)
    return None


def _longer(other: tuple[str, ...], chain: tuple[str, ...]) -> bool:
    return len(other) > len(chain) and other[: len(chain)] == chain


def _setting(chain: tuple[str, ...]) -> str:
    if chain[:2] == ("run", "submodel"):
        return "submodel.name"
    return ".".join(chain[2:]) if chain[:2] == ("run", "config") else ""
