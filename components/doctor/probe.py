# SPDX-License-Identifier: Apache-2.0
"""Two processes that move 64 MiB with NIXL: ``python -m components.doctor.probe auto``.

Prints UCX's protocol tables (which the caller enables in the environment) and finally one line of JSON after
``PROBE``. Exits with 1 when the bytes are wrong. The caller owns the time-out.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from multiprocessing.connection import Connection

import msgspec
import torch

from components.transfer import AgentConfig, KVPool, TransferAgent, Transport
from components.transfer.control.record import decode, encode

BLOCKS, BLOCK_BYTES = 64, 1 << 20
MARK = "PROBE "


class Measured(msgspec.Struct, frozen=True):
    """Figures of the second of two transfers; the first one connects."""

    first_s: float
    seconds: float
    bytes: int
    descriptors: int
    right: bool


def _agent(name: str, transport: Transport, fill: int) -> tuple[TransferAgent, torch.Tensor]:
    tensor = torch.full((BLOCKS, BLOCK_BYTES), fill, dtype=torch.uint8)
    agent = TransferAgent(AgentConfig(name=name, backends=("nixl",), transport=transport))
    agent.start([KVPool("probe", tensor, BLOCKS, 0)])
    return agent, tensor


def _source(pipe: Connection, transport: Transport) -> None:
    agent, _ = _agent("source", transport, 7)
    pipe.send_bytes(encode(agent.record))
    agent.directory.put(decode(pipe.recv_bytes()))
    pipe.recv_bytes()
    agent.close()


def main(transport: Transport) -> bool:
    """Move and print. True when the bytes are right."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    peer = context.Process(target=_source, args=(there, transport), daemon=True)
    peer.start()
    agent, tensor = _agent("destination", transport, 0)
    here.send_bytes(encode(agent.record))
    record = decode(here.recv_bytes())
    agent.directory.put(record)
    times = []
    for number in range(2):
        tensor.zero_()
        began = time.perf_counter()
        ids = list(range(BLOCKS))
        handle = agent.fetch(record.ref, ids, ids, request_id=f"doctor-{number}", deadline_s=30)
        result = handle.wait(40)
        times.append(time.perf_counter() - began)
    right = bool((tensor == 7).all())
    measured = Measured(times[0], times[1], result.bytes, result.descriptors, right)
    print(MARK + msgspec.json.encode(measured).decode(), flush=True)
    here.send_bytes(b"end")
    peer.join(10)
    agent.close()
    return right


if __name__ == "__main__":
    sys.exit(0 if main(Transport(sys.argv[1])) else 1)
