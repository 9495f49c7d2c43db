# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding before, during and after moves: ``python -m benchmarks.migration.drafts --json out.json``.

Two engines in one program, one greedy request: unmoved on one engine, then moved to and fro live, then unmoved again.
An output has the tokens of one step, so (mean - 1) / drafts is the share of accepted drafts; outputs taken during a
move, which vLLM joins, are left out of it.
"""

from __future__ import annotations

import asyncio
import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer

from benchmarks.migration.engines import Answer, engines, greedy, program, tell, to_and_fro
from components import models
from components.errors import MigrateError

_PROMPT = 300


class Run(msgspec.Struct):
    """A model and its drafts, and the answers."""

    model: str
    drafts: dict[str, Any]
    """vLLM's ``speculative_config``."""
    dtype: str = "auto"
    phases: list[Answer] = []

    def rows(self) -> list[list[str]]:
        """Accepted share, tokens for each step and second."""
        return [[Path(self.model).name, self.drafts["method"], *self._figures(answer)] for answer in self.phases]

    def _figures(self, answer: Answer) -> list[str]:
        each = np.array([n for at, (_, n) in enumerate(answer.steps) if at and at not in set(answer.joined)])
        seconds = answer.steps[-1][0] - answer.steps[0][0]
        accepted = (float(each.mean()) - 1) / self.drafts["num_speculative_tokens"]
        rate = (len(answer.tokens) - answer.steps[0][1]) / seconds
        return [answer.name, str(len(answer.moved_at)), f"{accepted:.2f}", f"{each.mean():.2f}", f"{rate:.0f}"]


_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
_RUNS = [
    Run("smollm2", _NGRAM),
    # In bfloat16 on CPUs a step's numbers depend on its drafts, so equal logits may end in other texts, moved or not.
    Run("tiny-llama", _NGRAM, "float32"),
    Run("tiny-llama", {"method": "draft_model", "model": "tiny-llama", "num_speculative_tokens": 3}, "float32"),
    Run("tiny-llama", {"method": "eagle", "model": "tiny-llama-eagle", "num_speculative_tokens": 3}, "float32"),
    Run("tiny-mimo", {"method": "mtp", "num_speculative_tokens": 1}, "float32"),
]


async def _measure(run: Run, tokens: int, moves: int) -> None:
    prompt = tuple(1000 + number % 97 for number in range(_PROMPT))
    drafts = run.drafts | ({"model": models.resolve(run.drafts["model"])} if "model" in run.drafts else {})
    arguments = {"model": models.resolve(run.model), "dtype": run.dtype, "speculative_config": drafts}
    async with engines(**arguments, num_gpu_blocks_override=300, max_num_seqs=4) as (a, b):
        for engine in (a, b):
            await Answer("warm").rest(engine.generate(greedy("warm", prompt, tokens)))
        before = await Answer("before").rest(a.generate(greedy("before", prompt, tokens)))
        during = await to_and_fro(a, b, greedy("moved", prompt, tokens), Answer("moved"), moves)
        after = await Answer("after").rest(a.generate(greedy("after", prompt, tokens)))
    if not before.tokens == during.tokens == after.tokens:
        raise MigrateError(f"{run.model}, {run.drafts['method']}: the moved request gave other tokens")
    run.phases = [before, during, after]


def main(
    model: Annotated[str, typer.Option(help="folder or name, or smollm2, tiny-llama")] = "smollm2",
    drafts: Annotated[str, typer.Option(help="vLLM's speculative-config, JSON; without it several are tried")] = "",
    dtype: Annotated[str, typer.Option(help="as vLLM's; compare texts of MLA models in float32")] = "auto",
    tokens: Annotated[int, typer.Option(min=100, help="of each answer")] = 1000,
    moves: Annotated[int, typer.Option(min=1, help="of the answer that moves")] = 20,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Share of drafts accepted and tokens per second of one request before, during and after moves."""
    runs = [Run(model, jsonlib.loads(drafts), dtype)] if drafts else _RUNS
    for run in runs:
        asyncio.run(_measure(run, tokens, moves))
    head = ["model", "drafts", "answer", "moves", "drafts accepted", "tokens/step", "tokens/s"]
    tell(head, [row for run in runs for row in run.rows()], {"runs": runs}, json, width=120)


if __name__ == "__main__":
    program(main)
