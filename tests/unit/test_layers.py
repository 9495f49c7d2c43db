# SPDX-License-Identifier: Apache-2.0
"""The layers: no module imports from a higher layer, and the import graph has no circle."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Lowest first; rooms of one row do not know each other.
LAYERS = [
    {"errors", "wire", "output"},
    {"address", "folders", "versions", "yamltext", "lifeline"},
    {"env"},
    {"credentials", "models", "config", "timeline"},
    {"frames", "messages"},
    {"handshake", "process"},
    {"acceptor"},
    {"transfer"},
    {"engine"},
    {"migration"},
    {"metrics", "status"},
    {"client", "worker"},
    {"serve"},
    {"planner_hooks"},
    {"dashboard", "doctor", "planner"},
    {"cli"},
    {"__init__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def modules() -> dict[str, Path]:
    found = {}
    for top in ("components", "planner_hooks"):
        for path in (ROOT / top).rglob("*.py"):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> str:
    """The folder or file directly under ``components``; ``planner_hooks`` is one room."""
    top, _, rest = module.partition(".")
    return top if top == "planner_hooks" else rest.partition(".")[0] or "__init__"


def imports(node: ast.AST, types: bool) -> Iterator[str]:
    """Modules of ours that a module names, in functions too; ``types``: also what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if not types and isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name in MODULES)
        elif isinstance(child, ast.ImportFrom) and child.module:
            for alias in child.names:
                named = [name for name in (f"{child.module}.{alias.name}", child.module) if name in MODULES]
                yield from named[:1]
        else:
            yield from imports(child, types)


@functools.cache
def graph(types: bool) -> dict[str, set[str]]:
    found = {}
    for module, path in MODULES.items():
        # A package that a module of its own names is there before that module.
        named = set(imports(ast.parse(path.read_text(encoding="utf-8")), types))
        found[module] = {other for other in named if not module.startswith(other)}
    return found


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("name", [room for rooms in LAYERS for room in sorted(rooms)])
def test_a_room_knows_only_those_below_it(name: str) -> None:
    upward = {
        (module, other)
        for module, others in graph(types=True).items()
        for other in others
        if room(module) == name and room(other) != name and FLOOR[room(other)] >= FLOOR[name]
    }
    assert not upward


@pytest.mark.parametrize("types", [False, True])
def test_no_modules_need_each_other(types: bool) -> None:
    """Not even for type checkers: two modules that know each other are one."""
    TopologicalSorter(graph(types)).prepare()
