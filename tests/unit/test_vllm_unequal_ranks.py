# SPDX-License-Identifier: Apache-2.0
"""Jobs of workers between engines of unequal tensor-parallel sizes: vLLM's caches, real transfer agents."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from components.engine.kv import RequestId
from components.engine.vllm.records import Job, JobResult
from components.transfer import AgentConfig, TransferAgent
from components.transfer.heads import Rank, held

vllm = pytest.importorskip("vllm.v1.kv_cache_interface")
from components.engine.vllm.loader import Loader  # noqa: E402
from components.engine.vllm.pools import heads_of, pools_of  # noqa: E402
from tests.unit.test_vllm_pools import BLOCKS, LAYERS, SIZE, TOKENS, attention, caches, plan  # noqa: E402

HEADS = 4
SRC, DST = (4, 1, 5), (0, 3, 2)


class Worker:
    """A rank's caches, agent and jobs."""

    def __init__(self, name: str, namespace: str, rank: Rank, layout: str, latent: bool, model: torch.Tensor) -> None:
        heads = held(1 if latent else HEADS, rank)
        spec = (
            attention("MLAAttentionSpec", num_kv_heads=1, max_tp_shards=1)
            if latent
            else attention(num_kv_heads=len(heads))
        )
        config = plan(layout, spec)
        self.caches = caches(config, layout)
        for cache, whole in zip(self.caches.values(), model, strict=True):
            cache.copy_(whole[:, heads.start : heads.stop])
        self.heads = heads
        vllm_config: Any = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=rank.size, decode_context_parallel_size=1),
            model_config=SimpleNamespace(get_total_num_kv_heads=lambda: HEADS),
            kv_transfer_config=SimpleNamespace(kv_connector_extra_config={}),
        )
        pools = pools_of(self.caches, config, heads_of(vllm_config))
        self.agent = TransferAgent(
            AgentConfig(
                name=f"{name}-{rank.number}",
                namespace=namespace,
                backends=("local", "tcp"),
                tp_rank=rank.number,
                tp_size=rank.size,
            )
        )
        self.agent.start(pools)
        self.loader = Loader(vllm_config, config)
        self.loader._agent = self.agent


@pytest.fixture(params=[(1, 2), (2, 1), (2, 4), (4, 2), (1, 8)], ids=str)
def sizes(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=["LBHNC", "LBNHC", "BLNHC", "latent"])
def engines(request: pytest.FixtureRequest, sizes: tuple[int, int]) -> Iterator[tuple[list[Worker], list[Worker], Any]]:
    latent, namespace = request.param == "latent", uuid.uuid4().hex
    layout = "LBNHC" if latent else request.param
    content = SIZE if latent else 2 * SIZE
    shape = (2, LAYERS, BLOCKS, 1 if latent else HEADS, TOKENS, content)
    models = torch.randn(shape).to(torch.bfloat16)
    made = [
        [Worker(name, namespace, Rank(n, size), layout, latent, models[number]) for n in range(size)]
        for number, (name, size) in enumerate(zip(("src", "dst"), sizes, strict=True))
    ]
    yield made[0], made[1], models
    for worker in made[1] + made[0]:
        worker.agent.close()


def run(source: list[Worker], target: list[Worker], monkeypatch: pytest.MonkeyPatch) -> list[JobResult]:
    """What each rank of the target makes of the same job."""
    sums = [worker.agent.checksums(SRC) for worker in source]
    units = [worker.agent.checksum_units for worker in source]
    checks = tuple(
        (block, tuple(each[n * count : (n + 1) * count] for each, count in zip(sums, units, strict=True)))
        for n, block in enumerate(DST)
    )
    agents = tuple(worker.agent.ref for worker in source)
    results = []
    for number, worker in enumerate(target):
        monkeypatch.setattr(Loader, "rank", number)
        job = Job(number, RequestId("r"), agents, SRC, DST, checks[1:], DST[:1], 9.0)
        (result,) = worker.loader.copy_now([job], 30.0)
        assert result is not None
        results.append(result)
    return results


def test_every_rank_has_its_heads_of_the_source_s_blocks(engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, models = engines
    results = run(source, target, monkeypatch)
    assert all(result.ok and result.bytes for result in results), results
    for worker in target:
        for layer, cache in enumerate(worker.caches.values()):
            expected = models[1, layer].clone()
            expected[list(DST)] = models[0, layer][list(SRC)]
            assert torch.equal(cache, expected[:, worker.heads.start : worker.heads.stop])


def test_a_rank_whose_heads_differ_from_the_source_s_refuses_the_blocks(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, _ = engines
    plain = TransferAgent.fetch

    def late(agent: TransferAgent, *args: Any, **more: Any) -> Any:
        """The source overwrites the last token of its last head after it has told its checksums."""
        for worker in source:
            list(worker.caches.values())[1][SRC[2], -1, -1, -1] = 7.0
        return plain(agent, *args, **more)

    monkeypatch.setattr(TransferAgent, "fetch", late)
    results = run(source, target, monkeypatch)
    assert not results[-1].ok and results[-1].error is not None and results[-1].error[0] == "integrity"
    assert set(results[-1].bad_blocks) == {DST[2], DST[0]}
