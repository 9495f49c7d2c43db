# SPDX-License-Identifier: Apache-2.0
"""A process with one transfer agent, driven by a test: ``Peer`` starts it, ``main`` is what runs in it."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from components.errors import MigrateError, from_code
from components.transfer import AgentConfig, KVPool, TransferAgent
from components.transfer.control.record import AgentRecord, decode, encode

TOKENS = 48
TOKEN_AXES = {"NHD": 2, "HND": 3, "planes": 2, "latent": 1, "all layers": 3}


def pools(block_size: int, seed: int) -> list[KVPool]:
    """One pool of each axis order that engines use, in different dtypes, all of 48 tokens."""
    generator = torch.Generator().manual_seed(seed)
    blocks, heads, dim = TOKENS // block_size, 2, 8
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype, int]] = {
        "NHD": ((blocks, 2, block_size, heads, dim), torch.bfloat16, 0),
        "HND": ((blocks, 2, heads, block_size, dim), torch.float16, 0),
        "planes": ((2, blocks, block_size, heads, dim), torch.float32, 1),
        "latent": ((blocks, block_size, 3 * dim), torch.uint8, 0),
        "all layers": ((blocks, 3, 2, block_size, heads, dim), torch.bfloat16, 0),
    }
    made = []
    for name, (shape, dtype, block_dim) in shapes.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        raw = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        made.append(KVPool(name, raw.view(dtype).view(shape), blocks, block_dim))
    return made


def by_token(data: Sequence[torch.Tensor], block_size: int) -> list[torch.Tensor]:
    """The pools' bytes as (tokens, bytes)."""
    found = []
    for pool, tensor in zip(pools(block_size, 0), data, strict=True):
        ordered = tensor.movedim((pool.block_dim, TOKEN_AXES[pool.name]), (0, 1)).contiguous()
        found.append(ordered.view(torch.uint8).reshape(TOKENS, -1))
    return found


class Peer:
    """The test's end. ``prefix`` is put before the command line (``ip netns exec``)."""

    def __init__(self, name: str, block_size: int, seed: int, prefix: Sequence[str] = (), **more: Any) -> None:
        ours, theirs = socket.socketpair()
        command = [*prefix, sys.executable, "-m", "tests.integration.transfer_peer", str(theirs.fileno())]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("UCX_")}
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), env=environment)
        theirs.close()
        self._pipe: Connection = multiprocessing.connection.Connection(ours.detach())
        layout = {"block_size": block_size, "layers": 7}
        self._pipe.send(({"name": name, **layout, **more}, seed))
        self.block_size = block_size
        self._record: AgentRecord | None = None

    @property
    def record(self) -> AgentRecord:
        """Its record; waits for its start."""
        if self._record is None:
            assert self._pipe.poll(120), "the peer did not start"
            self._record = decode(self._pipe.recv_bytes())
        return self._record

    def ask(self, command: str, *arguments: Any) -> Any:
        """Have it do something. Raises the error that it answers with."""
        assert self.record.name
        self._pipe.send((command, arguments))
        assert self._pipe.poll(120), f"no answer to {command}"
        answer = self._pipe.recv()
        if isinstance(answer, tuple) and answer and answer[0] == "error":
            raise from_code(*answer[1:])
        return answer

    def meet(self, other: Peer) -> None:
        """Tell it of another agent, as the store would."""
        self.ask("meet", encode(other.record))

    def data(self) -> list[torch.Tensor]:
        """Copies of its pools."""
        raw = [torch.from_numpy(array) for array in self.ask("data")]
        return [
            r.view(p.tensor.dtype).view(p.tensor.shape) for r, p in zip(raw, pools(self.block_size, 0), strict=True)
        ]

    def fetch(self, other: Peer, src: list[int], dst: list[int], deadline_s: float = 20.0) -> tuple[int, str]:
        """Bytes and lane of a fetch, whose blocks are compared with the source's."""
        moved: tuple[int, str] = self.ask("fetch", other.record.name, src, dst, deadline_s)
        assert self.ask("checksums", dst) == other.ask("checksums", src)
        return moved

    def end(self) -> None:
        """Close the agent and the process."""
        self._pipe.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(pipe: Connection) -> None:
    """Answer until the test closes the connection."""
    settings, seed = pipe.recv()
    share = settings.pop("share", False)
    parts = pools(settings["block_size"], seed)
    if share:
        for part in parts:
            part.tensor.share_memory_()
    agent = TransferAgent(AgentConfig(**settings))
    agent.start(parts)
    pipe.send_bytes(encode(agent.record))
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send(_answer(agent, parts, command, arguments))
        except MigrateError as error:
            pipe.send(("error", error.code, str(error)))
    agent.close()
    os._exit(0)


def _answer(agent: TransferAgent, parts: list[KVPool], command: str, arguments: Any) -> Any:
    if command == "meet":
        agent.directory.put(decode(arguments[0]))
    elif command == "fetch":
        name, src, dst, deadline_s = arguments
        peer = agent.directory.get(name)
        assert peer is not None
        done = agent.fetch(peer.ref, src, dst, request_id="r", deadline_s=deadline_s)
        result = done.wait(deadline_s + 30)
        return result.bytes, result.lane
    elif command == "checksums":
        return agent.checksums(*arguments)
    elif command == "refill":
        for part, fresh in zip(parts, pools(agent.record.block_size, arguments[0]), strict=True):
            part.tensor.copy_(fresh.tensor)
    elif command == "unsafe":
        return sorted(agent.unsafe_blocks())
    elif command == "data":
        return [part.tensor.contiguous().view(torch.uint8).numpy() for part in parts]
    return None


if __name__ == "__main__":
    main(multiprocessing.connection.Connection(int(sys.argv[1])))
