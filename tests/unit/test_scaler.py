# SPDX-License-Identifier: Apache-2.0
"""The planner's numbers of workers become processes; no needed worker is stopped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from components.client import Drained
from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo, EngineStats, RequestPhase
from components.migration.messages import RequestRow
from components.serve.plan import Plan, Process
from components.serve.scale import Scaler, worker_name
from components.status import Status, WorkerReport
from components.transfer.ids import AgentName, AgentRef, Epoch


@dataclass
class Decision:
    decision_id: int
    num_prefill_workers: int
    num_decode_workers: int


@dataclass(eq=False)
class Worker:
    process: Process
    ready_file: Path
    alive: bool = True

    @property
    def label(self) -> str:
        return f"{self.process.component}.{self.process.replica}"


def process(replica: int) -> Process:
    return Process(component="DecodeWorker", replica=replica, role="decode", command=["python"], environment={})


@dataclass
class Graph:
    """Supervisor, planner and the workers' client at once."""

    folder: Path
    decision: Decision = field(default_factory=lambda: Decision(-1, -1, -1))
    children: list[Worker] = field(default_factory=list)
    done: list[Decision] = field(default_factory=list)
    drained: list[str] = field(default_factory=list)
    leaving: tuple[int, ...] = ()
    stuck: tuple[int, ...] = ()
    """Those with a request that cannot move."""
    missing: tuple[int, ...] = ()
    workers_answer: bool = True

    async def add(self, added: Process) -> Worker:
        child = Worker(added, self.folder / f"{added.replica}.ready")
        child.ready_file.touch()
        self.children.append(child)
        return child

    async def serves(self, child: Worker) -> bool:
        return child.ready_file.exists()

    async def remove(self, child: Worker) -> None:
        self.children.remove(child)

    async def get(self) -> Decision:
        return self.decision

    async def complete(self, decision: Decision) -> None:
        self.done.append(decision)

    async def refresh(self) -> None:
        pass

    def status(self) -> Status:
        known = [c for c in self.children if c.ready_file.exists() and self.workers_answer]
        return Status(
            tuple(
                WorkerReport(
                    worker=c.label,
                    role="decode",
                    missing="no answer" if c.process.replica in self.missing else "",
                    draining=c.process.replica in self.leaving,
                    requests=tuple(
                        RequestRow(1, RequestId("r"), RequestPhase.DECODE, 10, 50, not_migratable="it does not travel")
                        for replica in self.stuck
                        if replica == c.process.replica
                    ),
                    info=EngineInfo("m", "", 32, 100, 4096, 16, 2048, (AgentRef(AgentName(n), Epoch("")),)),
                    stats=EngineStats(1, 0, 0, 0, 50 + c.process.replica, 100),
                )
                for c in known
                for n in [worker_name(c.process)]
            )
        )

    async def drain(self, worker: str, timeout_s: float) -> Drained:
        self.drained.append(worker)
        return Drained(worker, 0, ())

    def names(self) -> list[str]:
        return [child.label for child in self.children]


@pytest.fixture
async def graph(tmp_path: Path) -> Graph:
    graph = Graph(tmp_path)
    for replica in range(2):
        await graph.add(process(replica))
    return graph


@pytest.fixture
def scaler(graph: Graph) -> Scaler:
    plan = Plan(
        namespace="test",
        transport="auto",
        model="m",
        processes=[process(0), process(1)],
        spare=[process(2)],
        bounds={"decode": (1, 3)},
    )

    async def connect() -> Any:
        return graph

    supervisor: Any = graph
    return Scaler(plan, supervisor, graph, connect)


async def test_the_worker_that_is_cheapest_to_empty_goes(graph: Graph, scaler: Scaler) -> None:
    """One that holds less, unless a request there cannot move."""
    await graph.add(process(2))
    for count, gone in ((2, "DecodeWorker.2"), (1, "DecodeWorker.0")):
        graph.decision = Decision(0, 1, count)
        await scaler.follow()
        assert graph.drained[-1] == gone and gone not in graph.names()
        graph.stuck = (1,)


async def test_one_that_does_not_answer_is_not_taken_for_the_emptiest(graph: Graph, scaler: Scaler) -> None:
    graph.missing, graph.decision = (1,), Decision(0, 1, 1)
    await scaler.follow()
    assert graph.names() == ["DecodeWorker.1"]


async def test_a_worker_that_is_leaving_already_goes_after_a_drain(graph: Graph, scaler: Scaler) -> None:
    graph.leaving, graph.decision = (0,), Decision(0, 1, 1)
    await scaler.follow()
    assert graph.names() == ["DecodeWorker.1"]
    assert graph.drained == ["DecodeWorker.0"]
    assert graph.done == [graph.decision]


async def test_none_is_stopped_while_another_one_starts(graph: Graph, scaler: Scaler) -> None:
    graph.children[0].ready_file.unlink()
    graph.decision = Decision(0, 1, 1)
    await scaler.follow()
    assert len(graph.children) == 2
    assert graph.done == []
    graph.children[0].ready_file.touch()
    await scaler.follow()
    assert len(graph.children) == 1


async def test_none_is_stopped_while_another_one_has_crashed(graph: Graph, scaler: Scaler) -> None:
    graph.children[1].alive = False
    graph.decision = Decision(0, 1, 1)
    await scaler.follow()
    assert len(graph.children) == 2


async def test_none_is_stopped_before_they_answer(graph: Graph, scaler: Scaler) -> None:
    graph.workers_answer, graph.decision = False, Decision(0, 1, 1)
    await scaler.follow()
    assert (len(graph.children), graph.done) == (2, [])


async def test_a_planner_that_was_started_again_counts_from_zero(graph: Graph, scaler: Scaler) -> None:
    for decision, count in ((Decision(0, 1, 3), 3), (Decision(0, 1, 2), 2), (Decision(0, 1, 2), 2)):
        graph.decision = decision
        await scaler.follow()
        assert len(graph.children) == count
    assert graph.done == [Decision(0, 1, 3), Decision(0, 1, 2)]


async def test_a_worker_that_has_ended_for_good_is_started_again(graph: Graph, scaler: Scaler) -> None:
    graph.decision = Decision(0, 1, 3)
    await scaler.follow()
    await graph.remove(graph.children[-1])
    await scaler.follow()
    assert len(graph.children) == 3
    assert graph.done == [graph.decision]
