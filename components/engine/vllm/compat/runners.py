# SPDX-License-Identifier: Apache-2.0
"""The state of a request that vLLM's model runners keep beside its KV, and its transfer.

V1 (``vllm.v1.worker.gpu_model_runner``; CPUs)
    Keeps each request's tokens in ``requests`` and a random generator for each seed. A request from another engine
    is entered as a preempted one before the step that resumes it, so penalties, minimum lengths and seeded sampling
    continue exactly. Only the generator's state has to travel.

V2 (``vllm.v1.worker.gpu.model_runner``; vLLM's default on GPUs)
    A resumed request comes with the step as a new one, with all of its tokens (``prefill_token_ids``), from which
    penalties are counted. Sampling draws its noise from (seed, position, token id) and has no state: nothing travels
    and nothing is entered.

The two draw different noise for one seed. The runner's version is part of the fingerprint, so that a request never
moves from one to the other.

Threading: the worker's step thread.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.sampling_params import SamplingType
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from components import versions
from components.engine.vllm.compat.tokens import gather
from components.engine.vllm.records import Install

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger(__name__)


class RunnerPort:
    """One worker's model runner; as it is, V2, of which nothing travels: vLLM's scheduler sends the tokens."""

    def export_state(self, vllm_id: str) -> bytes:
        """State of a request's random generator; empty without one."""
        return b""

    def import_state(self, install: Install) -> None:
        """Enter a request from another engine."""


def runner_version(config: VllmConfig) -> str:
    """The runner that vLLM uses with this configuration: ``v1`` or ``v2``."""
    return "v2" if config.use_v2_model_runner else "v1"


def runner_port(model_runner: Any) -> RunnerPort:
    """The port of a worker's ``model_runner``."""
    version = runner_version(model_runner.vllm_config)
    if version == "v1":
        return RunnerV1(model_runner)
    gather(model_runner)
    return RunnerPort()


class RunnerV1(RunnerPort):
    """See the module docstring."""

    def __init__(self, model_runner: Any) -> None:
        self._runner = model_runner
        # From 0.32 on, the CPU sampler draws one number for a token and derives the rest from it.
        self._seeds_from_generator = versions.series(versions.installed("vllm")) >= (0, 32)

    def export_state(self, vllm_id: str) -> bytes:
        """The generator's state."""
        request = self._runner.requests.get(vllm_id)
        if request is None or request.generator is None:
            return b""
        return bytes(request.generator.get_state().numpy().tobytes())

    def import_state(self, install: Install) -> None:
        """Enter it as preempted; the scheduler sends block ids with the step."""
        params = install.sampling_params
        generator = None
        if params.sampling_type == SamplingType.RANDOM_SEED:
            generator = torch.Generator(device=self._runner.device)
            generator.manual_seed(params.seed)
            if not _set_state(generator, install.rng_state):
                self._skip_draws(generator, len(install.output_token_ids))
        state = CachedRequestState(
            req_id=install.vllm_id,
            prompt_token_ids=install.prompt_token_ids,
            mm_features=install.mm_features,
            sampling_params=params,
            generator=generator,
            block_ids=([],),
            num_computed_tokens=0,
            output_token_ids=list(install.output_token_ids),
            lora_request=install.lora_request,
        )
        if self._runner.uses_mrope:
            # Positions in several dimensions, as of Qwen's models that see: text has them too.
            self._runner._init_mrope_positions(state)
        self._runner.requests[install.vllm_id] = state

    def _skip_draws(self, generator: torch.Generator, count: int) -> None:
        """Advance the generator by ``count`` tokens, with the draws of vLLM's sampler."""
        fp64, device = self._runner.sampler.use_fp64_gumbel, self._runner.device
        if self._seeds_from_generator and device.type == "cpu" and not fp64:
            for _ in range(count):
                torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
            return
        # One exponential for each entry of the vocabulary (v1/sample/ops/topk_topp_sampler.py, random_sample).
        dtype = torch.float64 if fp64 else torch.float32
        row = torch.empty(self._runner.input_batch.vocab_size, dtype=dtype, device=device)
        for _ in range(count):
            row.exponential_(generator=generator)


def _set_state(generator: torch.Generator, state: bytes) -> bool:
    """Continue with the state from another engine; False without one, or when the generator refuses it."""
    if not state:
        return False
    try:
        generator.set_state(torch.from_numpy(np.frombuffer(state, dtype=np.uint8).copy()))
    except RuntimeError as error:
        logger.warning("the state of a random generator is not used: %s", error)
        return False
    return True
