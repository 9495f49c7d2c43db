# SPDX-License-Identifier: Apache-2.0
"""Disaggregated prefill: stock frontend, real vLLM, two prefill and three decode workers, and one aggregated one."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from tokenizers import Tokenizer

from components.client import Workers
from components.errors import MigrateError
from tests.integration.dynamo_workers import Answer, Served, ask

pytestmark = pytest.mark.integration

PROMPT = [50 + (7 * i * i) % 991 for i in range(300)]
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 60, "ignore_eos": True},
    "short prompt": {"prompt": [9, 8, 7], "max_tokens": 20, "ignore_eos": True},
    "seeded": {"temperature": 0.9, "top_p": 0.9, "seed": 7, "max_tokens": 60, "ignore_eos": True},
    "penalties": {"temperature": 0.8, "seed": 3, "presence_penalty": 0.9, "frequency_penalty": 0.5, "max_tokens": 60},
    "logprobs": {"logprobs": 3, "max_tokens": 20, "ignore_eos": True},
    "one token": {"max_tokens": 1},
    "one token with logprobs": {"max_tokens": 1, "logprobs": 2},
    "min_tokens": {"max_tokens": 30, "min_tokens": 20, "ignore_eos": True},
    "seeded min_tokens": {"temperature": 0.9, "seed": 5, "max_tokens": 30, "min_tokens": 20},
}
STOPPED: dict[str, dict[str, Any]] = {"stop at once": {"max_tokens": 8}, "not yet": {"max_tokens": 8, "min_tokens": 5}}
"""Their stop token is the first one of the greedy answer."""
MOVED = {"prompt": [70 + (3 * i * i) % 883 for i in range(500)], "max_tokens": 2000, "ignore_eos": True}


class Scene:
    """What the tests share: the processes, one loop, and what a worker answers that does both."""

    def __init__(self, runner: asyncio.Runner, served: Served, together: dict[str, Answer]) -> None:
        self.runner = runner
        self.served = served
        self.together = together
        runner.run(served.ready())
        self.workers: Workers = runner.run(served.workers_client())

    def run(self, work: Callable[[aiohttp.ClientSession], Awaitable[Any]]) -> Any:
        async def whole() -> Any:
            async with aiohttp.ClientSession() as session:
                return await asyncio.wait_for(work(session), 240)

        return self.runner.run(whole())

    async def counts(self) -> Counter[str]:
        """Outcomes of hand-overs, over all workers."""
        await self.workers.refresh()
        total: Counter[str] = Counter()
        for worker in self.workers.status().workers:
            total.update(worker.handoffs)
        return total

    async def empty(self) -> None:
        """Every block of every worker is accounted for, and free."""
        for _ in range(100):
            await self.workers.refresh()
            workers = [worker for worker in self.workers.status().workers if not worker.missing]
            if all(w.stats is not None and w.stats.free_blocks == w.stats.total_blocks for w in workers):
                break
            await asyncio.sleep(0.1)
        else:
            raise AssertionError([(worker.role, worker.stats) for worker in workers])
        for worker in workers:
            await self.workers.check(worker.worker)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str, etcd_url: str) -> Iterator[Scene]:
    roles = ["prefill", "prefill", "decode", "decode", "decode"]
    with asyncio.Runner() as runner:
        both = Served(tmp_path_factory.mktemp("together"), tiny_llama, etcd_url, ["agg"])
        served = Served(tmp_path_factory.mktemp("apart"), tiny_llama, etcd_url, roles)
        try:
            together = runner.run(answers_of(both, tiny_llama))
            both.stop()
            yield Scene(runner, served, together)
        finally:
            both.stop()
            served.stop()


async def answers_of(served: Served, model: str) -> dict[str, Answer]:
    """All of ``REQUESTS``, and those that the first token ends."""
    await served.ready()
    async with aiohttp.ClientSession() as session:
        one = await ask(session, served, prompt=PROMPT, max_tokens=1)
        tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        for fields in STOPPED.values():
            fields["stop_token_ids"] = [
                number for number in range(tokenizer.get_vocab_size()) if tokenizer.decode([number]) == one.text.strip()
            ]
        return {k: await ask(session, served, **{"prompt": PROMPT, **v}) for k, v in (REQUESTS | STOPPED).items()}


@pytest.mark.parametrize("kind", [*REQUESTS, *STOPPED])
def test_answers_are_those_of_a_worker_that_does_both(scene: Scene, kind: str) -> None:
    async def work(session: aiohttp.ClientSession) -> tuple[Answer, Counter[str]]:
        before = await scene.counts()
        answer = await ask(session, scene.served, **{"prompt": PROMPT, **(REQUESTS | STOPPED)[kind]})
        await scene.empty()
        return answer, await scene.counts() - before

    answer, told = scene.run(work)
    assert not answer.errors and answer.same() == scene.together[kind].same()
    used = "stop" if kind in STOPPED else "min_tokens" if kind == "seeded min_tokens" else "used"
    assert told == {"lent": 1, f"first_token_{used}": 1}


def test_prompts_are_in_the_metrics_of_vllms_own_connector(scene: Scene) -> None:
    async def transferred(session: aiohttp.ClientSession) -> float:
        total = 0.0
        for _, url in scene.served.metrics:
            async with session.get(url) as reply:
                text = await reply.text()
            assert "vllm:nixl_num_kv_expired_reqs_total" in text
            total += sum(float(v) for v in re.findall(r"^vllm:nixl_bytes_transferred_sum\{.*\} (\S+)", text, re.M))
        return total

    async def work(session: aiohttp.ClientSession) -> None:
        before = await transferred(session)
        prompt = [30 + (11 * i * i) % 877 for i in range(320)]
        assert not (await ask(session, scene.served, prompt=prompt, max_tokens=20, ignore_eos=True)).errors
        block = (await transferred(session) - before) / 10
        assert block > 0 and block == int(block), "a prompt of ten blocks"

    scene.run(work)


def test_a_request_that_has_moved_passes_the_prefill_worker_again_and_goes_on(scene: Scene) -> None:
    async def work(session: aiohttp.ClientSession) -> None:
        plain = await ask(session, scene.served, **MOVED)
        before = await scene.counts()
        asking = asyncio.ensure_future(ask(session, scene.served, **MOVED))
        moved = False
        while not moved and not asking.done():
            await asyncio.sleep(0.05)
            await scene.workers.refresh()
            for worker, row in scene.workers.status().requests():
                if worker.role == "decode" and row.output_tokens > 20:
                    with suppress(MigrateError):
                        moved = (await scene.workers.move(row.request_id)).ok
        answer = await asking
        assert moved and not answer.errors
        assert answer.same() == plain.same()
        await scene.empty()
        assert (await scene.counts() - before)["owned"] >= 1

    scene.run(work)


def test_a_killed_prefill_worker_loses_no_answer_and_no_block(scene: Scene) -> None:
    prompts = [[60 + number + (5 * i * i) % 877 for i in range(900)] for number in range(8)]

    async def work(session: aiohttp.ClientSession) -> None:
        before = (await scene.counts())["first_token_used"]
        many = [ask(session, scene.served, prompt=prompt, max_tokens=30, ignore_eos=True) for prompt in prompts]
        asking = [asyncio.ensure_future(one) for one in many]
        while (await scene.counts())["first_token_used"] == before:
            await asyncio.sleep(0.01)
        scene.served.kill("prefill")
        answers = await asyncio.gather(*asking)
        assert [answer.errors for answer in answers] == [[]] * len(prompts)
        for prompt, answer in zip(prompts, answers, strict=True):
            again = await ask(session, scene.served, prompt=prompt, max_tokens=30, ignore_eos=True)
            assert again.same() == answer.same()
        await scene.empty()

    scene.run(work)
