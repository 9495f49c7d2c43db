# SPDX-License-Identifier: Apache-2.0
"""Parameters of a simulation; ``calibrate`` fits the step time to measured steps.

A forward step takes ``base + per_seq * batch + per_kv_token * KV + per_prefill_token * chunk`` seconds. The
defaults are in the range of an 8B model in BF16 on one H100 and are assumptions, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np


class StepTime(msgspec.Struct, frozen=True):
    """Coefficients of a forward step, in seconds."""

    base_s: float = 0.008
    per_seq_s: float = 4e-5
    per_kv_token_s: float = 4e-8
    per_prefill_token_s: float = 2.5e-5


class WorkerModel(msgspec.Struct, frozen=True):
    """One decode worker."""

    step: StepTime = StepTime()
    capacity_tokens: int = 160_000
    max_seqs: int = 256
    chunk_tokens: int = 2048
    """Most prompt tokens in one step."""
    watermark: float = 0.01
    """Share of KV kept free when a request is admitted."""
    kv_bytes_per_token: int = 131_072
    bytes_per_s: float = 10e9
    """Bandwidth of one worker, shared by its migrations."""
    overhead_s: float = 0.08
    downtime_s: float = 0.03
    interference: float = 0.03
    """Share by which each running migration slows a worker's steps."""
    prefix_blocks: int = 256
    """Prefix blocks in a worker's cache (least recently used)."""
    prefix_block_tokens: int = 512


class Slo(msgspec.Struct, frozen=True):
    """A request is good when it meets both."""

    ttft_s: float = 2.0
    tpot_s: float = 0.05


def calibrate(rows: Sequence[tuple[int, int, int, float]]) -> StepTime:
    """Least squares over measured steps: (batch, KV tokens, prefill tokens, seconds). No coefficient below zero."""
    from scipy.optimize import nnls

    data = np.asarray(rows, dtype=float)
    matrix = np.column_stack([np.ones(len(data)), data[:, :3]])
    scale = np.maximum(np.abs(matrix).max(axis=0), 1.0)
    found, _ = nnls(matrix / scale, data[:, 3])
    base, per_seq, per_kv, per_prefill = (found / scale).tolist()
    return StepTime(base, per_seq, per_kv, per_prefill)


def saturation_rate(prompts: Sequence[int], outputs: Sequence[int], model: WorkerModel) -> float:
    """Requests per second at which one worker is full: batch, KV or time, whichever comes first.

    By Little's law a rate ``r`` keeps ``r * outputs * step`` requests running; the step time depends on their number,
    and prompts take a share of the time.
    """
    prompt, output = np.asarray(prompts, dtype=float), np.asarray(outputs, dtype=float)
    kv_each = float((prompt * output + output**2 / 2).sum() / output.sum())
    step = model.step

    def fits(rate: float) -> bool:
        share = 1.0 - rate * prompt.mean() * step.per_prefill_token_s
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
