# SPDX-License-Identifier: Apache-2.0
"""The transfer component alone: one process has KV blocks, another one fetches some of them.

    python -m examples.transfer_two_processes

No Dynamo, no engine, no etcd: the two processes exchange their records over a pipe. In a cluster they would be
given ``etcd_endpoints`` instead, and would find each other.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import torch

from components.transfer import AgentConfig, KVPool, TransferAgent
from components.transfer.control.record import decode, encode

LAYERS, BLOCKS, TOKENS, HEADS, SIZE = 4, 256, 16, 8, 128


def start(name: str) -> tuple[TransferAgent, list[torch.Tensor]]:
    """An agent with one pool for each layer; pools are registered once, whatever is moved later."""
    layers = [torch.zeros(BLOCKS, 2, TOKENS, HEADS, SIZE, dtype=torch.bfloat16) for _ in range(LAYERS)]
    agent = TransferAgent(
        AgentConfig(name=name, fingerprint="example", block_size=TOKENS, dtype="bfloat16", layers=LAYERS)
    )
    agent.start([KVPool(f"layer.{number}", layer, BLOCKS, block_dim=0) for number, layer in enumerate(layers)])
    return agent, layers


def prefill(pipe: Connection) -> None:
    """The source: its record goes out, then it only has to stay alive; its agent answers by itself."""
    agent, layers = start("prefill")
    for number, layer in enumerate(layers):
        layer.fill_(number + 1)
    pipe.send_bytes(encode(agent.record))
    agent.directory.put(decode(pipe.recv_bytes()))
    pipe.send(agent.checksums([7, 3, 11]))
    pipe.recv()
    agent.close()


def main() -> None:
    """The destination."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=prefill, args=(theirs,), daemon=True)
    process.start()
    agent, layers = start("decode")
    peer = decode(pipe.recv_bytes())
    pipe.send_bytes(encode(agent.record))
    agent.directory.put(peer)
    checksums = pipe.recv()

    handle = agent.fetch(peer.ref, [7, 3, 11], [0, 1, 2], request_id="request-1", deadline_s=10)
    result = handle.wait(15)

    print(f"{result.bytes / 1e6:.1f} MB in {result.descriptors} descriptors over {result.lane}")
    print(f"post {result.post_s * 1e3:.2f} ms, wire {result.wire_s * 1e3:.2f} ms")
    if agent.checksums([0, 1, 2]) != checksums:
        raise SystemExit("the bytes are not those of the source")
    for number, layer in enumerate(layers):
        if not bool((layer[:3] == number + 1).all()) or bool(layer[3:].any()):
            raise SystemExit(f"layer {number} is not what was sent")
    print("every layer has the source's bytes, and only in the blocks that were asked for")
    pipe.send(None)
    process.join(10)
    agent.close()


if __name__ == "__main__":
    main()
