# SPDX-License-Identifier: Apache-2.0
"""Logs hold no token ids and no texts of users, also where moves fail."""

from __future__ import annotations

import ast
import asyncio
import logging
import re
from pathlib import Path

import pytest

from components.engine.protocol import Sampling
from components.migration.messages import Mode
from tests.streams import Cluster
from tests.virtual import virtual, virtual_agents

ROOT = Path(__file__).parents[2]
VOCABULARY = 10**9
"""So large that a token's number is nothing else by chance."""
TEXTS = {"tokens", "token_ids", "prompt_token_ids", "output_token_ids", "prompt", "text", "payload", "body", "outputs"}
"""Names of what users send and get."""


@pytest.mark.parametrize("seed", range(6))
def test_moves_losses_and_repeats_log_no_token(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    prompts = [tuple(range(VOCABULARY - 1000 * n - 20, VOCABULARY - 1000 * n)) for n in range(1, 7)]
    answers: list[list[int]] = [[] for _ in prompts]

    @virtual
    async def run() -> None:
        sampling = Sampling(temperature=0.0, max_tokens=60)
        faults = {"late": 0.1, "double": 0.1, "lost answer": 0.2}
        workers = Cluster("logs", seed, faults)
        await workers.start(4, agents=virtual_agents(seed), vocab_size=VOCABULARY, step_s=0.002)
        asked = zip(prompts, answers, strict=True)
        running = asyncio.gather(
            *(workers.complete(prompt, sampling, tokens=answer) for prompt, answer in asked), return_exceptions=True
        )
        for step in range(40):
            await asyncio.sleep(0.004)
            if step == 12:
                await workers.rng.choice(workers.nodes).kill()
            asyncio.ensure_future(workers.move(workers.rng.choice(list(Mode))))
        await running
        await workers.stop()

    run()
    assert all(answers) and len(caplog.records) > 5
    known = {str(token) for tokens in (*prompts, *answers) for token in tokens}
    assert not known & set(re.findall(r"\d+", caplog.text))


def test_no_line_of_a_log_is_made_of_what_users_send_or_get() -> None:
    found = []
    for path in sorted((ROOT / "components").rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).startswith("logger.")):
                continue
            for argument in call.args:
                if isinstance(argument, ast.Name | ast.Attribute) and ast.unparse(argument).rpartition(".")[2] in TEXTS:
                    found.append(f"{path}:{call.lineno} {ast.unparse(argument)}")
    assert not found
