# SPDX-License-Identifier: Apache-2.0
"""Outputs of a life as its readers get them."""

from __future__ import annotations

from components.engine.kv import RequestId
from components.engine.protocol import FinishReason, GenerateOutput, TokenLogprob
from components.migration.legs import Arrival, join


def test_outputs_are_joined_but_not_over_an_end_or_a_gap() -> None:
    one, two = GenerateOutput(0, (5,), (TokenLogprob(-0.5),), cached_tokens=3), GenerateOutput(1, (6, 7))
    end = GenerateOutput(3, (8,), finish_reason=FinishReason.LENGTH)
    frozen = GenerateOutput(3, finish_reason=FinishReason.FROZEN)
    both = GenerateOutput(0, (5, 6, 7), (TokenLogprob(-0.5),), cached_tokens=3)
    assert join([one, two, end]) == [both, end]
    assert join([one, two, frozen]) == [both, frozen]
    assert join([end, GenerateOutput(4, (9,))]) == [end, GenerateOutput(4, (9,))]
    assert join([one, GenerateOutput(2, (6,))]) == [one, GenerateOutput(2, (6,))]
    assert join([]) == [] and join([one]) == [one]


async def test_a_slow_reader_of_a_life_gets_its_tokens_together() -> None:
    leg = Arrival(RequestId("r"), RequestId("r~1"), (1, 2), bytes, before=(3,))
    for index in range(1, 5):
        leg.add(GenerateOutput(index, (10 + index,)))
    leg.add(GenerateOutput(5, (15,), finish_reason=FinishReason.STOP))
    read = [(output.index, output.token_ids, output.finish_reason) async for output in leg.read(2)]
    assert read == [(2, (12, 13, 14), None), (5, (15,), FinishReason.STOP)]
