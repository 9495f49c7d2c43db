# SPDX-License-Identifier: Apache-2.0
"""vLLM with the defaults of GPUs: attention backend, model runner, CUDA graphs, bfloat16.

Two engines on two GPUs, or both on one. Four requests of different lengths move twenty times each, and their tokens
equal those of unmoved ones. One request at a time: a batch of another size may round differently without any move.
The model has layers of Llama 3.1 8B's shape with random weights (8 of them, 4.5 GB, or ``DYN_MIGRATE_TEST_LAYERS``).
vLLM's own dummy weights are so small that a next token hardly depends on the KV cache.

    pytest -m slow -s tests/cuda/test_vllm_moves.py      prints lane, runner and attention backend
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.migration.sampled import SampledEngine
from components.engine.kv import RequestId
from components.engine.protocol import GenerateRequest, Sampling
from tests.integration.moves import Client, move, request_of, run, take_until
from tests.integration.vllm_engines import Pair

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.skipif(not GPUS, reason="needs an NVIDIA GPU"),
]

MOVES = 20
PROMPTS = [16, 300, 1500, 6000]
SAMPLINGS = {
    "greedy": Sampling(temperature=0.0, max_tokens=1200, ignore_eos=True),
    "seeded": Sampling(temperature=0.9, top_p=0.95, seed=7, max_tokens=1200, ignore_eos=True),
}
LAYERS = int(os.environ.get("DYN_MIGRATE_TEST_LAYERS", "8"))


def make_model(folder: str) -> None:
    """Runs in a process of its own, so that the test's never has a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=65536,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=LAYERS,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def pair(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory, etcd_url: str) -> Iterator[Pair]:
    model = tmp_path_factory.mktemp("llama")
    maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(str(model),))
    maker.start()
    maker.join()
    assert maker.exitcode == 0
    pair = runner.run(start(model, etcd_url))
    yield pair
    runner.run(pair.stop())


async def start(model: Path, etcd_url: str, sizes: tuple[int, int] = (1, 1), **options: Any) -> Pair:
    """Engines of these tensor-parallel sizes: a on the first GPUs, b on the last ones; they may share."""
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(GPUS)))).split(",")
    engines = []
    for name, size, devices in zip("ab", sizes, (visible[: sizes[0]], visible[-sizes[1] :]), strict=True):
        # Read by the engine core's process, which vLLM starts anew.
        os.environ.update(CUDA_VISIBLE_DEVICES=",".join(devices), VLLM_WORKER_MULTIPROC_METHOD="spawn")
        engine = SampledEngine.of(
            {
                "model": str(model),
                "skip_tokenizer_init": True,
                "max_model_len": 8192,
                "max_num_seqs": 8,
                "tensor_parallel_size": size,
                "kv_cache_memory_bytes": 3 << 30,
                # Every move copies the whole request.
                "enable_prefix_caching": False,
                # Two engines may share a GPU; the KV cache has a size of its own.
                "gpu_memory_utilization": 0.4,
                # CUDA graphs without compilation: an engine starts in a quarter of the time.
                "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
                "seed": 0,
            },
            {"name": name, "etcd_endpoints": [etcd_url], "namespace": namespace, "transport": "auto"},
            **options,
        )
        info = await engine.start()
        print(f"engine {name} on GPUs {devices}: lanes {info.lanes}, fingerprint {info.fingerprint}")
        engines.append(engine)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
    assert engines[0].info.fingerprint == engines[1].info.fingerprint
    return Pair(*engines)


def test_vllm_chose_the_runner_and_backend_itself(pair: Pair) -> None:
    config = pair.a.llm.vllm_config
    print(f"model runner {'V2' if config.use_v2_model_runner else 'V1'}, attention {config.attention_config.backend}")
    assert "VLLM_USE_V2_MODEL_RUNNER" not in os.environ


@pytest.mark.parametrize("live", [True, False], ids=["live", "stop-and-copy"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("kind", list(SAMPLINGS))
def test_twenty_moves_change_no_token(runner: asyncio.Runner, pair: Pair, kind: str, prompt: int, live: bool) -> None:
    async def scenario() -> None:
        sampling = SAMPLINGS[kind]
        stayed = request_of(f"stayed-{kind}-{prompt}-{live}", prompt, sampling)
        plain = await run(pair.a, stayed)
        moved = GenerateRequest(RequestId(f"moved-{kind}-{prompt}-{live}"), stayed.prompt_token_ids, sampling)
        client, lanes = Client(), set()
        stream: AsyncIterator[object] = pair.a.generate(moved)
        source, target = pair.a, pair.b
        for _ in range(MOVES):
            await take_until(stream, client, len(client.tokens) + 6)  # type: ignore[arg-type]
            stream = await move(source, target, moved, client, stream, live)  # type: ignore[assignment]
            lanes.add((await target.landing_status(moved.request_id)).lane)
            source, target = target, source
        async for output in stream:
            client.take(output)  # type: ignore[arg-type]
        print(f"{kind}, {prompt} tokens, {'live' if live else 'stop-and-copy'}: {MOVES} moves by {sorted(lanes)}")
        # Engines in processes of their own on one host: no lane is faster.
        assert lanes == {"cuda_ipc/kernel"}
        assert client.tokens == plain.tokens
        assert client.finish is plain.finish

    runner.run(asyncio.wait_for(scenario(), 300))


async def require_whole(pair: Pair) -> None:
    """No block is lost."""
    for engine in (pair.a, pair.b):
        await engine.check_integrity()
        stats = (await engine.report())[0]
        assert stats.free_blocks == stats.total_blocks


def test_no_block_is_lost(runner: asyncio.Runner, pair: Pair) -> None:
    runner.run(asyncio.wait_for(require_whole(pair), 60))
