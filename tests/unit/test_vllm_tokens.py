# SPDX-License-Identifier: Apache-2.0
"""Tokens of requests from other engines, as vLLM's scheduler sends them and model runner V2 takes them."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from components.engine.kv import RequestId
from components.engine.vllm.control import Marker
from tests.vllm_scheduler import Played, offer_of

pytest.importorskip("vllm")
from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor  # noqa: E402

from components.engine.vllm.compat.resumed import append_tokens  # noqa: E402
from components.engine.vllm.compat.tokens import Gathered, Known, gather, known  # noqa: E402


class Pool:
    """V2's buffers, without a GPU."""

    def copy_to_uva(self, values: Any) -> Any:
        copied = np.zeros(8192, np.int32)
        copied[: len(values)] = values
        return copied[: len(values)]


def request_of(tokens: list[int]) -> Any:
    return SimpleNamespace(_all_token_ids=tokens, all_token_ids=None)


@pytest.mark.parametrize("more", [[], [7, 8]], ids=["as it began", "with output tokens"])
def test_v2_gets_the_tokens_that_it_would_get(more: list[int]) -> None:
    moved, plain = request_of(list(range(3000))), list(range(50))
    known(moved)
    moved._all_token_ids.extend(more)
    tensor: Any = object.__new__(StagedWriteTensor)
    runner = SimpleNamespace(req_states=SimpleNamespace(all_token_ids=tensor))
    tensor.clear_staged_writes = StagedWriteTensor.clear_staged_writes.__get__(tensor)
    tensor._staged_write_indices, tensor._staged_write_starts, tensor._staged_write_cu_lens = [], [], []
    gather(runner)
    for _ in range(2):
        tensor.stage_write(3, 0, plain)
        tensor.stage_write(5, 0, moved._all_token_ids)
        tensor.stage_write_elem(6, 42)
        assert tensor._staged_write_cu_lens == [50, 3050 + len(more), 3051 + len(more)]
        sent = Pool().copy_to_uva(tensor._staged_write_contents)
        assert sent.tolist() == [*plain, *range(3000), *more, 42]
        tensor.clear_staged_writes()
        assert len(tensor._staged_write_contents) == 0


def test_a_request_s_tokens_stay_a_list_that_grows(tiny_llama: str) -> None:
    played = Played(tiny_llama, max_model_len=2048)
    prompt = [token % 90 + 1 for token in range(1500)]
    request = played.add(prompt, Marker(RequestId("moved"), 1490, landing=offer_of("moved", 1489)), "moved")
    assert isinstance(request._all_token_ids, Known) and list(request.all_token_ids) == prompt
    append_tokens(request, [5, 6])
    assert list(request.all_token_ids) == [*prompt, 5, 6] and request.num_tokens == 1502
    assert pickle.loads(pickle.dumps(request._all_token_ids)).first.tolist() == prompt
    assert isinstance(np.asarray(Gathered()), np.ndarray)
