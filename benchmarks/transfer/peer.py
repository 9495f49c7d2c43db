# SPDX-License-Identifier: Apache-2.0
"""Pools in the shape of a model's KV cache, and the process that owns the source's."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.transfer.collective import serve
from components.transfer import AgentConfig, KVPool, SharedZeros, TransferAgent
from components.transfer.control.record import decode, encode


@dataclass(frozen=True)
class Shape:
    """KV cache of a model in BF16, 16 tokens a block, one tensor for each layer, K and V of a block together."""

    name: str
    layers: int
    kv_heads: int
    head_size: int
    block_size: int = 16

    @property
    def segment_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return 2 * self.block_size * self.kv_heads * self.head_size * 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.layers * self.segment_bytes


SHAPES = {
    shape.name: shape
    for shape in (
        # Layers, KV heads and head size as in the models' published config.json.
        Shape("llama-3-70b", 80, 8, 128),
        Shape("mixtral-8x22b", 56, 8, 128),
        Shape("smollm2-135m", 30, 3, 64),
    )
}


def pools(shape: Shape, blocks: int, device: str, seed: int) -> list[KVPool]:
    """Pools of a worker, filled with numbers that differ everywhere."""
    generator = torch.Generator(device=device).manual_seed(seed)
    size = (blocks, 2, shape.block_size, shape.kv_heads, shape.head_size)
    made = []
    for layer in range(shape.layers):
        with SharedZeros():
            tensor = torch.zeros(size, dtype=torch.bfloat16, device=device)
        tensor.view(torch.int16).random_(generator=generator)
        made.append(KVPool(f"layer.{layer}", tensor, blocks, 0))
    return made


def settings(shape: Shape, name: str, **more: Any) -> AgentConfig:
    """Configuration of one side."""
    layout = {"block_size": shape.block_size, "dtype": "bfloat16", "layers": shape.layers}
    return AgentConfig(name=name, fingerprint=shape.name, **(layout | more))


def source(pipe: Connection, shape: Shape, blocks: int, device: str, more: dict[str, Any]) -> None:
    """Main of the source's process: publishes over the pipe, then answers until told to end."""
    agent = TransferAgent(settings(shape, "source", **more))
    parts = pools(shape, blocks, device, seed=1)
    agent.start(parts)
    pipe.send_bytes(encode(agent.record))
    agent.directory.put(decode(pipe.recv_bytes()))
    while True:
        command, argument = pipe.recv()
        if command == "checksums":
            pipe.send(agent.checksums(argument))
        elif command == "fetch":
            pipe.send(agent.fetch(*argument, request_id="back", deadline_s=20).wait(25).lane)
        elif command == "collective":
            serve(argument, device)
            pipe.send(None)
        else:
            agent.close()
            pipe.send(None)
            return
