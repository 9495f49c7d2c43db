# SPDX-License-Identifier: Apache-2.0
"""A worker's table: a request with several names in the engine is one row."""

from __future__ import annotations

from components.engine.kv import RequestId
from components.engine.protocol import RequestInfo, RequestPhase
from components.worker.report import _without_samples


def row(name: str, tokens: int) -> RequestInfo:
    return RequestInfo(RequestId(name), RequestPhase.DECODE, 5, tokens, 2, 1.0)


def test_samples_of_a_request_are_one_row() -> None:
    table = [row("a", 1), row("0_b", 3), row("1_b", 4), row("0_c", 9), row("2_d", 8)]
    found = list(_without_samples(table, {"a", "b", "2_d", "d"}))
    assert [(r.request_id, r.output_tokens, r.kv_blocks) for r in found] == [
        *(("a", 1, 2), ("0_c", 9, 2), ("2_d", 8, 2)),
        ("b", 7, 4),
    ]
