# SPDX-License-Identifier: Apache-2.0
"""Tables fit 80 columns, and shortened ids stay unique."""

from __future__ import annotations

import io
import uuid

import pytest
from rich.console import Console

from components.dashboard.sample import Sampler
from components.dashboard.tables import id_length, show_status
from components.dashboard.top import view
from components.engine.kv import RequestId
from components.engine.protocol import EngineInfo, EngineStats, RequestPhase
from components.migration.messages import Mode, MoveRecord, RequestRow
from components.status import Status, WorkerReport
from components.transfer.ids import AgentName, AgentRef, Epoch

STATS = EngineStats(256, 1024, 0, 0, 0, 100_000)
AGENTS = (AgentRef(AgentName("vllm-0"), Epoch("12345678")), AgentRef(AgentName("vllm-1"), Epoch("87654321")))
INFO = EngineInfo(
    "m", "f", 16, 100_000, 4096, 256, 2048, AGENTS, ("cuda_ipc/kernel", "nixl/ucx/cuda_ipc", "tcp/sockets")
)


def row(number: int, name: str, **more: object) -> RequestRow:
    phase = RequestPhase.PREEMPTED
    return RequestRow(number, RequestId(name), phase, 131_072, 131_072, age_s=86_400.0, moves=12, **more)  # type: ignore[arg-type]


def crowded() -> Status:
    names = [str(uuid.UUID(int=n << 64)) for n in range(1, 4)]
    why = "speculative decoding: the drafter's state cannot travel, whoever asks and however often"
    rows = tuple(row(n, name, not_migratable=why, moving=True) for n, name in enumerate(names))
    return Status(
        (
            WorkerReport("9e28ed1f", "prefill", requests=rows, stats=STATS, info=INFO, cordoned=True, draining=True),
            WorkerReport("9e28ed2a", missing="deadline_exceeded: worker 9e28ed2a did not answer status within 2 s"),
        ),
        (
            MoveRecord(names[0], "9e28ed1f", "9e28ed2a", Mode.LIVE, ok=False, code="not_migratable", reason=why),
            MoveRecord(
                *(names[1], "9e28ed1f", "9e28ed2a", Mode.STOP_AND_COPY),
                ok=True,
                downtime_s=12.3456,
                bytes=43_210_000_000,
                lane="nixl/ucx/cuda_ipc",
            ),
        ),
    )


def shown(status: Status, width: int, requests: int = 10, wide: bool = False) -> str:
    out = Console(width=width, file=io.StringIO(), record=True)
    show_status(status, requests, out, wide)
    return out.export_text()


def test_a_crowded_status_fits_eighty_columns() -> None:
    text = shown(crowded(), 80)
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("9e28ed1f", "9e28ed2a", "not_migratable", "stop-and-copy", "131072", "12345.6", "draining", "moving"):
        assert whole in text, whole


async def test_a_crowded_top_fits_eighty_columns() -> None:
    class Source:
        async def refresh(self, patience_s: float, decisions: bool = False) -> None:
            pass

        def status(self) -> Status:
            return crowded()

    sampler = Sampler(Source())  # type: ignore[arg-type]
    await sampler.once()
    out = Console(width=80, file=io.StringIO(), record=True)
    out.print(view(sampler.latest, sampler.history, ""))
    text = out.export_text()
    assert max(map(len, text.splitlines())) <= 80
    for whole in ("9e28ed1f", "9e28ed2a", "draining", "missing", "0%", "256", "131072", "stop-and-copy", "12345.6"):
        assert whole in text, whole


def test_ids_are_as_short_as_they_can_be_told_apart() -> None:
    first, second = "aaaaaaaa-1111", "aaaaaaaa-2222"
    assert id_length([first, second]) == 10
    assert id_length([first, first]) == id_length([]) == 8
    text = shown(Status((WorkerReport("00000001", requests=(row(1, first), row(2, second))),)), 80)
    assert "aaaaaaaa-1 " in text and "aaaaaaaa-2 " in text and "aaaaaaaa-11" not in text


def test_a_wide_status_has_everything_whole() -> None:
    status = crowded()
    text = shown(status, 1000, wide=True)
    for told in (*(request.request_id for _, request in status.requests()), "12345678", "tcp/sockets", "rounds"):
        assert told in text
    assert "12345678" not in shown(status, 80)


@pytest.mark.parametrize("width", [80, 1000])
def test_status_names_the_missing_the_leaving_and_why_a_request_stays(width: int) -> None:
    stays = RequestRow(1, RequestId("r1"), RequestPhase.DECODE, 10, not_migratable="n > 1 [2]", moving=False)
    status = Status(
        (
            WorkerReport("00000001", "decode", requests=(stays,), cordoned=True, draining=True),
            WorkerReport("00000002", missing="deadline: no answer"),
        ),
        (MoveRecord("r1", "00000001", "00000002", Mode.LIVE, ok=False, code="no_room", reason="3 blocks short"),),
    )
    text = shown(status, width)
    for told in ("draining", "missing", "(deadline:", "r1 cannot move: n > 1 [2]", "r1: no_room: 3 blocks short"):
        assert told in text
    assert "1 more requests; --requests 1 shows them" in shown(status, width, requests=0)
