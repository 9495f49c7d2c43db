# SPDX-License-Identifier: Apache-2.0
"""Families of models, drafters and an FP8 KV cache with what vLLM chooses on GPUs (model runner V2, attention).

Both engines of a pair are on the first GPU; models are those of ``benchmarks/models``, made here without a tokenizer
but for the one that sees: it must be in ``DYN_MIGRATE_CACHE``, or the package of its tokenizer installed. Its images
are prepared with Pillow where torchvision is missing.
Moves are live or stop-and-copy: a replay computes tokens in other steps than before, which bfloat16 rounds otherwise.
For the same reason an answer is compared with one whose prompt came from the prefix cache as its own does, and drafts,
whose number decides how a step rounds, are in float32 or with vLLM's batch invariance.

    pytest -m slow -s tests/cuda/test_vllm_families.py      prints lane, runner and attention backend of each
"""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from benchmarks.migration.sampled import SampledEngine
from benchmarks.models import MAKERS, resolve
from benchmarks.models.seeing import SEEING
from components.engine.protocol import Sampling
from components.engine.vllm.engine import VLLMEngine
from tests.integration.moves import Client, move, nothing_left, request_of, run, take_until
from tests.integration.vllm_engines import Pair
from tests.pillow import sitecustomize

__all__ = ["nothing_left"]
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.device_count(), reason="needs an NVIDIA GPU"),
]
ANSWERS = int(os.environ.get("DYN_MIGRATE_TEST_ANSWERS", "24"))
LENGTH = 120
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model": "tiny-llama"},
    "gemma3": {"model": "tiny-gemma3"},
    "gpt-oss": {"model": "tiny-gpt-oss"},
    "deepseek-v3": {"model": "tiny-deepseek-v3"},
    "qwen3-next": {"model": "tiny-qwen3-next"},
    "jamba": {"model": "tiny-jamba"},
    "fp8-kv": {"model": "tiny-llama-int8", "kv_cache_dtype": "fp8"},
    "eagle": {"model": "tiny-llama", "drafter": "tiny-llama-eagle", "drafts": {"method": "eagle"}, "dtype": "float32"},
    "mtp": {"model": "tiny-mimo", "drafts": {"method": "mtp"}, "dtype": "float32"},
    # No kernel for MLA takes float32.
    "mtp-mla": {"model": "tiny-deepseek-mtp", "drafts": {"method": "mtp"}, "invariant": True},
}
SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=LENGTH, ignore_eos=True),
    Sampling(temperature=0.9, top_p=0.95, seed=7, max_tokens=LENGTH, ignore_eos=True),
    Sampling(temperature=0.8, seed=11, presence_penalty=0.9, max_tokens=LENGTH, ignore_eos=True),
]
PROMPTS = [5, 31, 64, 97, 300, 700, 990]


class NoTokenizer:
    """What the makers of models ask a tokenizer for."""

    bos_token_id, eos_token_id = 1, 2

    def __len__(self) -> int:
        return 49152

    def save_pretrained(self, folder: Path) -> None:
        """Nothing: vLLM is given token ids."""


def made(name: str, parent: Path) -> str:
    if name in SEEING:
        return resolve(name)
    target = parent / name
    target.mkdir()
    MAKERS[name](NoTokenizer(), target)
    return str(target)


@pytest.fixture(scope="module")
def pair(
    runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory, etcd_url: str, request: pytest.FixtureRequest
) -> Iterator[Pair]:
    more, parent = dict(request.param), tmp_path_factory.mktemp("models")
    more["model"] = made(more["model"], parent)
    if drafts := more.pop("drafts", None):
        drafter = {"model": made(more.pop("drafter"), parent)} if "drafter" in more else {}
        more["speculative_config"] = drafts | drafter | {"num_speculative_tokens": 1}
    pair = runner.run(start(etcd_url, more))
    yield pair
    runner.run(pair.stop())


async def start(etcd_url: str, more: dict[str, Any]) -> Pair:
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if not more.get("skip_tokenizer_init", True):
        # For engine cores, as it is for this process.
        pillow = str(Path(sitecustomize.__file__).parent)
        os.environ["PYTHONPATH"] = os.pathsep.join([pillow, os.environ.get("PYTHONPATH", "")])
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(more.pop("invariant", False)))
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    args = {
        "skip_tokenizer_init": True,
        "max_model_len": 2048,
        "max_num_seqs": 8,
        # CUDA graphs without compilation: an engine starts in a quarter of the time.
        "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
        "kv_cache_memory_bytes": 1 << 28,
        "gpu_memory_utilization": 0.2,
        "seed": 0,
    }

    async def engine(name: str) -> VLLMEngine:
        agent = {"name": name, "etcd_endpoints": [etcd_url], "namespace": namespace, "transport": "auto"}
        made = await asyncio.to_thread(SampledEngine.of, args | more, agent)
        info = await made.start()
        config = made.llm.vllm_config
        print(
            f"engine {name}: {more}, lanes {info.lanes}, runner V{1 + config.use_v2_model_runner}, attention "
            f"{config.attention_config.backend}, blocks of {config.cache_config.block_size}, states "
            f"{config.cache_config.mamba_cache_mode}"
        )
        return made

    engines = await asyncio.gather(engine("a"), engine("b"))
    assert engines[0].info.fingerprint == engines[1].info.fingerprint
    return Pair(*engines)


async def why_stays(engine: VLLMEngine) -> str | None:
    """Why requests of this engine do not move, or None."""
    async with aclosing(engine.generate(request_of("asked", 31, SAMPLINGS[0]))) as stream:
        await take_until(stream, Client(), 1)
        return (await engine.report())[1][0].not_migratable


async def moved_answers(pair: Pair, samplings: list[Sampling], answers: int) -> list[str]:
    """Each moved to and fro three times; what differs from unmoved ones."""
    if reason := await why_stays(pair.a):
        pytest.skip(reason)
    wrong = []
    for number in range(answers):
        sampling = samplings[number % len(samplings)]
        request = request_of(f"answer-{number}", PROMPTS[number % len(PROMPTS)] + number // len(PROMPTS), sampling)
        # From here on the prefix cache, if there is one, has the prompt.
        await run(pair.a, msgspec.structs.replace(request, sampling=Sampling(temperature=0.0, max_tokens=1)))
        plain = await run(pair.a, request)
        client, source, target = Client(), pair.a, pair.b
        stream: Any = source.generate(request)
        for stop in (6 + number % 7, 20 + number % 13, 40 + number % 32):
            await take_until(stream, client, stop)
            stream = await move(source, target, request, client, stream, live=number % 4 > 0)
            source, target = target, source
        async for output in stream:
            client.take(output)
        if client.tokens != plain.tokens:
            again = [(await run(engine, request)).tokens == plain.tokens for engine in (pair.a, pair.b)]
            first = next(n for n, (a, b) in enumerate(zip(client.tokens, plain.tokens, strict=False)) if a != b)
            wrong.append(
                f"answer {number} ({len(request.prompt_token_ids)} tokens, {sampling}): differs from token {first} on; "
                f"unmoved once more, the engines give the same: {again}"
            )
    print(f"{answers - len(wrong)} of {answers} equal", *wrong, sep="\n")
    return wrong


def of(*names: str) -> pytest.MarkDecorator:
    """The pairs of these families, with and without a prefix cache."""
    pairs = [
        pytest.param(
            FAMILIES[name] | {"enable_prefix_caching": caching}, id=f"{name}-{'cached' if caching else 'plain'}"
        )
        for name in names
        for caching in (True, False)
    ]
    return pytest.mark.parametrize("pair", pairs, indirect=True)


@of(*(name for name in FAMILIES if "drafts" not in FAMILIES[name]))
def test_moved_answers_equal_unmoved_ones(runner: asyncio.Runner, pair: Pair) -> None:
    assert not runner.run(asyncio.wait_for(moved_answers(pair, SAMPLINGS, ANSWERS), 30 + 20 * ANSWERS))
    for engine in (pair.a, pair.b):
        assert not runner.run(engine.report())[0].kv_refused


@of(*(name for name in FAMILIES if "drafts" in FAMILIES[name]))
def test_moved_answers_beside_drafts_equal_unmoved_ones(runner: asyncio.Runner, pair: Pair) -> None:
    """Greedy ones: a seeded request stays beside drafts."""
    assert not runner.run(asyncio.wait_for(moved_answers(pair, SAMPLINGS[:1], ANSWERS), 30 + 20 * ANSWERS))


@pytest.mark.parametrize("pair", [{"model": "tiny-paddleocr-vl", "skip_tokenizer_init": False}], indirect=True)
@pytest.mark.parametrize("mode", ["live", "stop-and-copy"])
@pytest.mark.parametrize("kind", ["GREEDY", "SEEDED"])
def test_answers_about_images(runner: asyncio.Runner, pair: Pair, kind: str, mode: str) -> None:
    from tests.integration import test_vllm_images as images

    images.test_answers_about_images_that_move_equal_unmoved_ones(runner, pair, getattr(images, kind), mode)
