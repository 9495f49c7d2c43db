# SPDX-License-Identifier: Apache-2.0
"""Every call to another process has a deadline, and no time of another host is compared with a local one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from components.migration.messages import Attached, Owner
from components.migration.peers import OPEN_S, WorkerLost, follow
from tests.virtual import virtual

ROOT = Path(__file__).parents[2]
OUT = {
    "direct",
    "round_robin",
    "call",
    "create_connection",
    "open_connection",
    "urlopen",
    "get",
    "AsyncClient",
    "Client",
}
"""Names under which calls leave this process; those that are methods of dictionaries are told apart by ``_leaves``."""
BY_THEIR_CALLER = {
    ("components/migration/peers.py", "_ask"): "``call`` and ``Links`` bound it",
    ("components/migration/link_wire.py", "streams"): "its socket is connected already",
}
WALL_CLOCK = {
    "components/metrics/spans.py": "times of a trace",
    "components/dashboard/sample.py": "the axis of a chart",
    "components/transfer/assemble.py": "which of two lives of an agent is newer; see test_poison",
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    for folder in ("components", "planner_hooks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield str(path.relative_to(ROOT)), ast.parse(path.read_text())


def _leaves(call: ast.Call) -> bool:
    name = call.func
    if not isinstance(name, ast.Attribute) or name.attr not in OUT:
        return False
    owner = ast.unparse(name.value)
    if name.attr == "get":
        return owner == "httpx"
    if name.attr == "call":
        return owner.endswith("peers")
    return name.attr != "direct" or "client" in owner.lower()


def _bounded(call: ast.Call, parents: list[ast.AST], positional: int) -> bool:
    """A time-out is among its arguments, or somebody around it has one."""
    if any("timeout" in (word.arg or "") for word in call.keywords) or len(call.args) > positional:
        return True
    for node in parents:
        if isinstance(node, ast.AsyncWith) and any("timeout" in ast.unparse(i.context_expr) for i in node.items):
            return True
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("wait_for"):
            return True
    return False


def _calls(tree: ast.AST, parents: list[ast.AST]) -> Iterator[tuple[ast.Call, list[ast.AST]]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node, parents
        yield from _calls(node, [*parents, node])


def test_every_call_to_another_process_has_a_deadline() -> None:
    found, without = 0, []
    for path, tree in sources():
        for call, parents in _calls(tree, []):
            if not _leaves(call):
                continue
            found += 1
            functions = [n.name for n in parents if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
            # ``Peers.call`` has one of its own, for whoever gives none.
            default = isinstance(call.func, ast.Attribute) and call.func.attr == "call"
            known = any((path, name) in BY_THEIR_CALLER for name in functions)
            if not (default or known or _bounded(call, parents, 2)):
                without.append(f"{path}:{call.lineno} {ast.unparse(call.func)}")
    assert found > 20 and not without, without


def test_nobody_compares_times_of_two_hosts() -> None:
    """Ages and clocks of the own process are all there is: an hour between two hosts changes no decision."""
    used = {
        path
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "datetime.now", "datetime.utcnow")
    }
    assert used == set(WALL_CLOCK)


@virtual
async def test_an_owner_that_stands_still_is_not_waited_for_without_end() -> None:
    import asyncio

    class Standing:
        async def attach(self, *_: object) -> object:
            await asyncio.Event().wait()
            yield Attached()

    began = asyncio.get_running_loop().time()
    with pytest.raises(WorkerLost, match="did not take a reader"):
        await anext(follow(Standing().attach, Owner(2, 5), "r", 0))  # type: ignore[arg-type]
    assert asyncio.get_running_loop().time() - began == pytest.approx(OPEN_S)
