# SPDX-License-Identifier: Apache-2.0
"""The undisturbed answer of the paged engine, from the definition of its model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

from components.engine.kv import RequestId
from components.engine.paged.model import PagedKV, generator_of, salt_of
from components.engine.protocol import GenerateRequest, Sampling

SIZES: dict[str, Any] = {"block_size": 4, "max_model_len": 160, "vocab_size": 5000, "step_s": 0.01, "max_num_seqs": 8}


def request(name: str, prompt: Sequence[int], count: int, seed: int | None = None) -> GenerateRequest:
    """One that makes ``count`` tokens."""
    sampling = Sampling(temperature=0.7 if seed is not None else 0.0, seed=seed, max_tokens=count, ignore_eos=True)
    return GenerateRequest(RequestId(name), tuple(prompt), sampling)


def expected(request: GenerateRequest) -> list[int]:
    """Its tokens."""
    size = SIZES["block_size"]
    kv = PagedKV(SIZES["max_model_len"] // size, size, 2, 4, SIZES["vocab_size"])
    blocks = list(range(SIZES["max_model_len"] // size))
    tokens = list(request.prompt_token_ids)
    for position, token in enumerate(tokens):
        kv.write(token, position, blocks)
    for drawn in range(request.sampling.max_tokens or 0):
        salt, generator = salt_of(request.sampling, 0), generator_of(request.sampling, drawn)
        tokens.append(kv.next_token(len(tokens), blocks, salt, generator))
        kv.write(tokens[-1], len(tokens) - 1, blocks)
    return tokens[len(request.prompt_token_ids) :]


@contextmanager
def quiet() -> Iterator[None]:
    """Without the log lines of a thousand faults."""
    with mock.patch.object(logging.getLogger("components"), "disabled", True):
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
