# SPDX-License-Identifier: Apache-2.0
"""Cost of a move for each family of models: ``python -m benchmarks.migration.families --json out.json``.

Two engines in one program, one greedy answer of each model that is moved to and fro live; models of a few layers with
random weights (``benchmarks/models``), Llama among them for comparison. ``stall`` is the gap between the last
token here and the first one there, less the median gap between two tokens.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from benchmarks.migration.engines import Answer, engines, greedy, program, tell, to_and_fro
from benchmarks.models import resolve
from components.errors import MigrateError

_MODELS: dict[str, dict[str, Any]] = {
    "tiny-llama": {},
    "tiny-llama-int8": {"kv_cache_dtype": "fp8"},
    "tiny-gemma3": {"num_gpu_blocks_override": 900},
    "tiny-gpt-oss": {"num_gpu_blocks_override": 450},
    "tiny-deepseek-v3": {"num_gpu_blocks_override": 600, "block_size": 16},
    "tiny-qwen3-next": {"num_gpu_blocks_override": 100},
}
"""With arguments of vLLM's engine."""


class Moved(msgspec.Struct):
    """One model's answer."""

    model: str
    bytes_per_token: int
    """Bytes of layers that keep every token."""
    answer: Answer

    def row(self) -> list[str]:
        """Sizes, and times in milliseconds."""
        times = [at for at, _ in self.answer.steps]
        gap = float(np.median(np.diff(times)))
        down = np.array(self.answer.downtimes_s)
        stall = np.maximum(0.0, down - gap)
        return [
            self.model.removeprefix("tiny-"),
            f"{self.bytes_per_token:,}",
            f"{np.median(self.answer.bytes) / 1024:,.0f}",
            f"{gap * 1e3:.1f}",
            f"{np.median(down) * 1e3:.1f}",
            f"{np.percentile(down, 90) * 1e3:.1f}",
            f"{np.median(stall) * 1e3:.1f}",
        ]


async def _measure(model: str, prompt: int, moves: int) -> Moved:
    tokens = 60 * (moves + 1)
    # No engine has a part of the answer from before.
    arguments = {"num_gpu_blocks_override": 300, "enable_prefix_caching": False, "max_model_len": 2048}
    async with engines(model=resolve(model), **(arguments | _MODELS.get(model, {}))) as (a, b):
        text = tuple(1000 + number % 97 for number in range(prompt))
        plain = await Answer("plain").rest(a.generate(greedy("plain", text, tokens)))
        answer = await to_and_fro(a, b, greedy("moved", text, tokens), Answer("moved"), moves)
        if plain.tokens != answer.tokens:
            raise MigrateError(f"{model}: the moved request gave other tokens")
        return Moved(model, a.info.kv_bytes_per_token, answer)


def main(
    chosen: Annotated[str, typer.Option("--models", help="names of small models")] = ",".join(_MODELS),
    prompt: Annotated[int, typer.Option(min=1, help="tokens")] = 600,
    moves: Annotated[int, typer.Option(min=1, help="of each answer")] = 20,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Bytes that a move copies and the gap that a client sees, for each family of models."""
    found = [asyncio.run(_measure(model, prompt, moves)) for model in chosen.split(",")]
    head = ["model", "KV bytes/token", "KiB moved", "gap, ms", "downtime, ms", "p90, ms", "stall, ms"]
    tell(head, [each.row() for each in found], {"prompt": prompt, "models": found}, json, width=120)


if __name__ == "__main__":
    program(main)
