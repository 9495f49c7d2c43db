# SPDX-License-Identifier: Apache-2.0
"""Two small vLLM engines side by side, for tests that move requests between them."""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass
from typing import Any

from benchmarks.migration.sampled import SampledEngine
from tests.integration import warm


@dataclass
class Pair:
    """Two engines of the same model and layout."""

    a: SampledEngine
    b: SampledEngine

    async def stop(self) -> None:
        await asyncio.gather(self.a.stop(), self.b.stop())


def load(
    model: str,
    name: str,
    etcd_url: str,
    namespace: str,
    wait_bytes: int = 1 << 24,
    transport: str = "auto",
    backends: tuple[str, ...] = (),
    copy_deadline_s: float = 30.0,
    integrity: str = "tail",
    **engine_args: object,
) -> SampledEngine:
    """A small engine: 300 blocks of 32 tokens."""
    args: dict[str, object] = {
        "model": model,
        "max_model_len": 2048,
        "block_size": 32,
        "enforce_eager": True,
        "num_gpu_blocks_override": 300,
        "max_num_seqs": 8,
        "seed": 0,
    }
    agent: dict[str, object] = {"name": name, "etcd_endpoints": [etcd_url], "namespace": namespace}
    return SampledEngine.of(
        args | engine_args,
        agent | {"transport": transport} | ({"backends": backends} if backends else {}),
        wait_bytes=wait_bytes,
        copy_deadline_s=copy_deadline_s,
        integrity=integrity,
    )


async def start_pair(model: str, etcd_url: str, ranks: tuple[int, int] = (1, 1), **more: Any) -> Pair:
    """Start both engines, one after the other (two at once need twice the memory)."""
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS="1",
        NUMBA_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
    )
    warm.engines()
    namespace = f"test-{uuid.uuid4().hex[:8]}"
    engines = []
    for name, size in zip(("a", "b"), ranks, strict=True):
        engine = load(model, name, etcd_url, namespace, tensor_parallel_size=size, **more)
        await engine.start()
        engines.append(engine)
    return Pair(*engines)
