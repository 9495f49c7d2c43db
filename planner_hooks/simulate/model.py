# SPDX-License-Identifier: Apache-2.0
"""Parameters of a simulation: what was measured on two H200 with Llama-3.1-8B's shape in BF16, and where.

A step that only decodes takes ``base + per_seq * batch + per_kv_token * KV``. One that also computes prompts takes
``prompt`` more, or as long as its prompt tokens do. The files are in ``benchmarks/results``:

base, per_kv_token      steps of 5.0 and 6.0 ms with one stream of 1,024 and 32,768 tokens,
                        migration-h200x2-frontend.json
per_seq, prompt         6,036, 11,424 and 13,651 tokens/s with 64, 128 and 256 streams, prompts of 16, answers of 200
                        tokens, crowd-gpu.json, where steps with a prompt run without CUDA graphs (28 ms at the client);
                        the simulator gives 5,900, 9,175 and 14,025
per_prefill_token       an assumption: 16 GFLOP a token at 60% of the 989 TFLOP/s of the data sheet
overhead, downtime      59 ms for a move of 1,024 tokens, 9.5 ms of it without a token, migration-h200x2-frontend.json
commit, crowd_pause     two drains of 256 requests: 1.06 and 0.45 s from the first to the last commit, a median gap of
                        130 ms with 16 freezes at a time, crowd-move-h200x2.json
interference            gaps of neighbours during pre-copy +1 and +2%, migration-h200x2-frontend.json
bytes_per_s             copies between two GPUs, transfer-h100x2.json
capacity_tokens         what 0.9 of 141 GB leaves beside 16 GB of weights, at 128 KiB a token
max_seqs, chunk_tokens  vLLM's, as in crowd-gpu.json
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class StepTime(msgspec.Struct, frozen=True):
    """Coefficients of a forward step, in seconds."""

    base_s: float = 0.00495
    per_seq_s: float = 2e-5
    per_kv_token_s: float = 3.15e-8
    prompt_s: float = 0.018
    per_prefill_token_s: float = 2.7e-5


class WorkerModel(msgspec.Struct, frozen=True):
    """One decode worker."""

    step: StepTime = StepTime()
    capacity_tokens: int = 800_000
    max_seqs: int = 256
    chunk_tokens: int = 8192
    """Most prompt tokens in one step."""
    watermark: float = 0.01
    """Share of KV kept free when a request is admitted."""
    kv_bytes_per_token: int = 131_072
    bytes_per_s: float = 336e9
    """Bandwidth of one worker, shared by its migrations."""
    overhead_s: float = 0.058
    downtime_s: float = 0.0095
    commit_s: float = 0.003
    """A worker's time for each hand-over; they follow one another."""
    crowd_pause_s: float = 0.008
    """Added to the downtime by each other request that is frozen at the same time."""
    freezes: int = 16
    """Requests that a worker freezes at a time."""
    moves: int = 256
    """Moves that a leaving worker begins at a time."""
    interference: float = 0.015
    """Share by which each running migration slows a worker's steps, as far as they freeze at a time."""
    prefix_block_tokens: int = 512
    """Tokens for each of a trace's hash ids (Mooncake's)."""
    free_moves: bool = False
    """Moves take no time and disturb nobody: a bound for every policy that moves requests."""
    relays: bool = False
    """True with two workers: the frontend's router goes on counting a moved request where it placed it."""


class Slo(msgspec.Struct, frozen=True):
    """A request is good when it meets both."""

    ttft_s: float = 2.0
    tpot_s: float = 0.05


def saturation_rate(prompts: Sequence[int], outputs: Sequence[int], cached: float, model: WorkerModel) -> float:
    """Requests per second at which one worker is full: batch, KV or time, whichever comes first.

    By Little's law a rate ``r`` keeps ``r * outputs * step`` requests running; the step time depends on their number,
    and the share of prompts that no cache has takes a part of the time.
    """
    prompt, output = np.asarray(prompts, dtype=float), np.asarray(outputs, dtype=float)
    kv_each = float((prompt * output + output**2 / 2).sum() / output.sum())
    step = model.step
    prefill_s = max(step.prompt_s / 2, float(prompt.mean()) * (1.0 - cached) * step.per_prefill_token_s)
    """Two short prompts share a step, on average."""

    def fits(rate: float) -> bool:
        share = 1.0 - rate * prefill_s
        per_request = rate * output.mean() / max(share, 1e-9)
        denominator = 1.0 - per_request * (step.per_seq_s + step.per_kv_token_s * kv_each)
        if share <= 0 or denominator <= 0:
            return False
        batch = per_request * step.base_s / denominator
        return bool(batch <= model.max_seqs and batch * kv_each <= model.capacity_tokens)

    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
