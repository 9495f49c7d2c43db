# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding before, during and after moves: ``python -m benchmarks.migration.drafts --json out.json``.

Two engines in one program, one greedy request: unmoved on one engine, then moved to and fro live, then unmoved again.
An output has the tokens of one step, so (mean - 1) / drafts is the share of accepted drafts.
"""

from __future__ import annotations

import asyncio
import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.migration.engines import Answer, engines, greedy, program, tell, to_and_fro
from components import models
from components.errors import MigrateError

_PROMPT = 300
_NGRAM = '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}'


def _row(answer: Answer, drafts: int) -> list[str]:
    """Accepted share, tokens for each step and second."""
    each = np.array([tokens for _, tokens in answer.steps[1:]])
    rate = float(each.sum()) / (answer.steps[-1][0] - answer.steps[0][0])
    accepted = (float(each.mean()) - 1) / drafts
    return [answer.name, str(len(answer.moved_at)), f"{accepted:.2f}", f"{each.mean():.2f}", f"{rate:.0f}"]


async def _measure(model: str, dtype: str, drafts: dict[str, Any], tokens: int, moves: int) -> list[Answer]:
    prompt = tuple(1000 + number % 97 for number in range(_PROMPT))
    arguments = {"model": model, "dtype": dtype, "num_gpu_blocks_override": 300, "speculative_config": drafts}
    async with engines(**arguments, max_num_seqs=4) as (a, b):
        for engine in (a, b):
            await Answer("warm").rest(engine.generate(greedy("warm", prompt, tokens)))
        before = await Answer("before").rest(a.generate(greedy("before", prompt, tokens)))
        during = await to_and_fro(a, b, greedy("moved", prompt, tokens), Answer("moved"), moves)
        after = await Answer("after").rest(a.generate(greedy("after", prompt, tokens)))
    if not before.tokens == during.tokens == after.tokens:
        raise MigrateError("the moved request gave other tokens")
    return [before, during, after]


def main(
    model: Annotated[str, typer.Option(help="folder or name, or smollm2, tiny-llama")] = "smollm2",
    drafts: Annotated[str, typer.Option(help="vLLM's speculative-config, JSON")] = _NGRAM,
    dtype: Annotated[str, typer.Option(help="as vLLM's; compare texts of MLA models in float32")] = "auto",
    tokens: Annotated[int, typer.Option(min=100, help="of each answer")] = 1000,
    moves: Annotated[int, typer.Option(min=1, help="of the answer that moves")] = 20,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Share of drafts accepted and tokens per second of one request before, during and after moves."""
    config = jsonlib.loads(drafts)
    phases = asyncio.run(_measure(models.resolve(model), dtype, config, tokens, moves))
    head = ["answer", "moves", "drafts accepted", "tokens/step", "tokens/s"]
    rows = [_row(phase, config["num_speculative_tokens"]) for phase in phases]
    tell(head, rows, {"model": model, "drafts": config, "phases": phases}, json)


if __name__ == "__main__":
    program(main)
