# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding before, during and after moves: ``python -m benchmarks.migration.drafts --json out.json``.

Two engines in one program, one greedy request: unmoved on one engine, then moved to and fro live, then unmoved again.
Drafts are counted by vLLM's own counters of both engines (those of its metrics ``vllm:spec_decode_...``), step by step.
vLLM fills the first step of a landed request with placeholders, which it counts as drafts that were not accepted.
"""

from __future__ import annotations

import asyncio
import functools
import json as jsonlib
from collections.abc import Awaitable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import SchedulerStats

from benchmarks.migration.engines import Answer, engines, greedy, program, tell, to_and_fro
from benchmarks.models import resolve
from components.engine.vllm.compat.runners import runner_version
from components.errors import MigrateError

_PROMPT = 300


class Counts(msgspec.Struct):
    """Of engines' steps."""

    steps: int = 0
    """With drafts."""
    proposed: int = 0
    accepted: int = 0


class Phase(msgspec.Struct):
    """One answer, and the drafts of its steps."""

    answer: Answer
    counts: Counts

    def row(self, placeholders: int) -> list[str]:
        """Accepted share, also without so many for each move; tokens for each step with drafts and for each second."""
        counts, answer = self.counts, self.answer
        drafted = counts.proposed - placeholders * len(answer.moved_at)
        seconds = answer.steps[-1][0] - answer.steps[0][0]
        return [
            answer.name,
            str(len(answer.moved_at)),
            f"{counts.accepted / counts.proposed:.3f}",
            f"{counts.accepted / drafted:.3f}",
            f"{1 + counts.accepted / counts.steps:.2f}",
            f"{(len(answer.tokens) - answer.steps[0][1]) / seconds:.0f}",
        ]


class Run(msgspec.Struct):
    """A model and its drafts, and the answers."""

    model: str
    drafts: dict[str, Any]
    """vLLM's ``speculative_config``."""
    dtype: str = "auto"
    runner: str = ""
    """vLLM's model runner."""
    phases: list[Phase] = []

    def rows(self) -> list[list[str]]:
        """One for each answer."""
        placeholders = self.drafts["num_speculative_tokens"]
        return [[Path(self.model).name, self.drafts["method"], *phase.row(placeholders)] for phase in self.phases]


class Counter(StatLoggerBase):
    """Adds up what vLLM says of one engine's steps."""

    def __init__(self, vllm_config: VllmConfig, engine_index: int = 0, total: Counts | None = None) -> None:
        self._total = total or Counts()

    def record(self, scheduler_stats: SchedulerStats | None, *_: Any, **__: Any) -> None:
        """One step."""
        found = scheduler_stats.spec_decoding_stats if scheduler_stats is not None else None
        if found is not None:
            self._total.steps += found.num_drafts
            self._total.proposed += found.num_draft_tokens
            self._total.accepted += found.num_accepted_tokens

    def log_engine_initialized(self) -> None:
        """Nothing to do."""


_NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}
_RUNS = [
    Run("smollm2", _NGRAM),
    # In bfloat16 on CPUs a step's numbers depend on its drafts, so equal logits may end in other texts, moved or not.
    Run("tiny-llama", _NGRAM, "float32"),
    Run("tiny-llama", {"method": "draft_model", "model": "tiny-llama", "num_speculative_tokens": 3}, "float32"),
    Run("tiny-llama", {"method": "eagle", "model": "tiny-llama-eagle", "num_speculative_tokens": 3}, "float32"),
    Run("tiny-mimo", {"method": "mtp", "num_speculative_tokens": 1}, "float32"),
]


async def _measure(run: Run, tokens: int, moves: int, more: dict[str, Any]) -> None:
    prompt = tuple(1000 + number % 97 for number in range(_PROMPT))
    drafts = run.drafts | ({"model": resolve(run.drafts["model"])} if "model" in run.drafts else {})
    arguments = {"model": resolve(run.model), "dtype": run.dtype, "speculative_config": drafts}
    total = Counts()

    async def phase(answer: Awaitable[Answer]) -> Phase:
        total.steps = total.proposed = total.accepted = 0
        ended = await answer
        return Phase(ended, msgspec.structs.replace(total))

    loggers = [functools.partial(Counter, total=total)]
    arguments |= {"num_gpu_blocks_override": 300, "max_num_seqs": 4} | more
    async with engines(**arguments, stat_loggers=loggers) as (a, b):
        run.runner = runner_version(a.llm.vllm_config)
        for engine in (a, b):
            await Answer("warm").rest(engine.generate(greedy("warm", prompt, tokens)))
        run.phases = [
            await phase(Answer("before").rest(a.generate(greedy("before", prompt, tokens)))),
            await phase(to_and_fro(a, b, greedy("moved", prompt, tokens), Answer("moved"), moves)),
            await phase(Answer("after").rest(a.generate(greedy("after", prompt, tokens)))),
        ]
    if len({tuple(phase.answer.tokens) for phase in run.phases}) > 1:
        raise MigrateError(f"{run.model}, {run.drafts['method']}: the moved request gave other tokens")


def main(
    model: Annotated[str, typer.Option(help="folder or name, or smollm2, tiny-llama")] = "smollm2",
    drafts: Annotated[str, typer.Option(help="vLLM's speculative-config, JSON; without it several are tried")] = "",
    dtype: Annotated[str, typer.Option(help="as vLLM's; compare texts of MLA models in float32")] = "auto",
    tokens: Annotated[int, typer.Option(min=100, help="of each answer")] = 1000,
    moves: Annotated[int, typer.Option(min=1, help="of the answer that moves")] = 20,
    more: Annotated[str, typer.Option("--engine-args", help="further ones of vLLM, JSON")] = "{}",
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
) -> None:
    """Share of drafts accepted and tokens per second of one request before, during and after moves."""
    runs = [Run(model, jsonlib.loads(drafts), dtype)] if drafts else _RUNS
    head = ["model", "drafts", "answer", "moves", "accepted", "without placeholders", "tokens/step", "tokens/s"]
    for number, run in enumerate(runs, 1):
        asyncio.run(_measure(run, tokens, moves, jsonlib.loads(more)))
        tell(head, run.rows(), {"runs": runs[:number]}, json, width=120)


if __name__ == "__main__":
    program(main)
