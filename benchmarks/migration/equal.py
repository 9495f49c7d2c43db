# SPDX-License-Identifier: Apache-2.0
"""The table of docs/features.md of what moves for each family of models: ``python -m benchmarks.migration.equal``.

From ``families-cpu.json`` (``benchmarks.migration.families``) and ``families-equal-cpu.json``
(``python -m tests.integration.families``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.serving.tables import table

RESULTS = Path(__file__).parents[1] / "results"
MODES = ("live", "stop-and-copy", "replay")
NO_REPLAY = {"deepseek-v3", "qwen3-next"}
"""On CPUs a replay of these is not what an unmoved request gives: see ``tests/integration/families.py``."""
_MOVES = {
    "tiny-llama": ("Llama", "llama", "all blocks"),
    "tiny-llama-int8": ("int8 weights, FP8 KV", "int8, FP8 KV", "all blocks"),
    "tiny-gemma3": ("Gemma 3", "gemma3", "of five layers in six the blocks in the window"),
    "tiny-gpt-oss": ("gpt-oss", "gpt-oss", "of every second layer the blocks in the window"),
    "tiny-deepseek-v3": ("DeepSeek-V3", "deepseek-v3", "all blocks of one compressed head"),
    "tiny-qwen3-next": ("Qwen3-Next", "qwen3-next", "of three layers in four the state"),
    "": ("PaddleOCR-VL (text)", "paddleocr-vl", "all blocks"),
}
"""Names of a row: in the file of costs, for readers, in the file of counts; and what moves."""


class Cell(msgspec.Struct):
    """Answers of one kind."""

    family: str
    caching: bool
    """vLLM's choice where it does not take what was asked for."""
    apart: bool
    """Prefilled by one engine and decoded by the other."""
    mode: str
    kind: str
    runner: str = "v1"
    """vLLM's model runner."""
    answers: int = 0
    equal: int = 0
    as_vllm: int = 0
    """Further ones that are what vLLM makes of the same tokens as a prompt."""


class Counts(msgspec.Struct):
    """The file."""

    machine: dict[str, str]
    cells: list[Cell]


def lines(costs: Path = RESULTS / "families-cpu.json", counts: Path = RESULTS / "families-equal-cpu.json") -> list[str]:
    """The table, in Markdown."""
    cost = {found["model"]: found for found in msgspec.json.decode(costs.read_bytes())["models"]}
    cells = msgspec.json.decode(counts.read_bytes(), type=Counts).cells
    head = ["model", "what moves", "KV bytes/token", "KiB", "downtime, ms", "added, ms", *MODES, "in all"]
    rows = []
    for model, (name, family, moves) in _MOVES.items():
        of = [cell for cell in cells if cell.family == family]
        if model not in cost and not of:
            continue
        equal = [_equal([cell for cell in of if cell.mode == mode]) if of else "" for mode in MODES]
        rows.append([name, moves, *(_cost(cost[model]) if model in cost else [""] * 4), *equal, _all(of)])
    made = table(head, rows)
    made[1] = made[1].replace("---:", "---", 1)
    return made


def _cost(found: dict[str, Any]) -> list[str]:
    answer = found["answer"]
    gap = float(np.median(np.diff([at for at, _ in answer["steps"]])))
    down = np.array(answer["downtimes_s"])
    return [
        f"{found['bytes_per_token']:,}",
        f"{np.median(answer['bytes']) / 1024:,.0f}",
        f"{np.median(down) * 1e3:.1f}, {np.percentile(down, 90) * 1e3:.1f}",
        f"{np.median(np.maximum(0.0, down - gap)) * 1e3:.1f}",
    ]


def _equal(cells: list[Cell]) -> str:
    """Equal answers with a prefix cache, and without one."""
    return "; ".join(_share([cell for cell in cells if cell.caching is caching]) for caching in (True, False))


def _all(cells: list[Cell]) -> str:
    """Answers that are as they should be. Sampled replays of some families have nothing to be like."""
    counted = [cell for cell in cells if not (cell.mode == "replay" and cell.family in NO_REPLAY)]
    counted += [cell for cell in cells if cell not in counted and cell.kind == "greedy"]
    right = sum(cell.equal + cell.as_vllm for cell in counted)
    return f"{right}/{sum(cell.answers for cell in counted)}" if cells else ""


def _share(cells: list[Cell]) -> str:
    return ", ".join(_shares(cells)) or "-"


def _shares(cells: list[Cell]) -> Iterator[str]:
    if not cells:
        return
    yield f"{sum(cell.equal for cell in cells)}/{sum(cell.answers for cell in cells)}"
    if cells[0].family in NO_REPLAY and cells[0].mode == "replay":
        greedy = [cell for cell in cells if cell.kind == "greedy"]
        right, answers = sum(cell.equal + cell.as_vllm for cell in greedy), sum(cell.answers for cell in greedy)
        yield f"{right}/{answers} greedy as vLLM"


if __name__ == "__main__":
    print("\n".join(lines()))
