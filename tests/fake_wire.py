# SPDX-License-Identifier: Apache-2.0
"""A double of NCCL within one process: bytes pass through queues, or get stuck."""

from __future__ import annotations

import queue
import socket
import uuid
from dataclasses import dataclass, field

import torch

from components.errors import TransferError
from components.frames import read_frame, write_frame

Bytes = queue.SimpleQueue[torch.Tensor]


@dataclass
class Cable:
    """Shared state of a test's wires."""

    queues: dict[str, tuple[Bytes, Bytes]] = field(default_factory=dict)
    wires: list[FakeWire] = field(default_factory=list)
    stuck: bool = False
    """Nothing arrives any more."""
    broken: bool = False
    """No communicator can be made."""

    def connect(self, sock: socket.socket, rank: int, device: torch.device, end: float) -> FakeWire:
        """As ``nccl_wire.Connect``."""
        if self.broken:
            raise TransferError("no communicator today")
        if rank == 0:
            key = uuid.uuid4().hex
            self.queues[key] = (queue.SimpleQueue(), queue.SimpleQueue())
            write_frame(sock, key.encode(), end)
        else:
            key = read_frame(sock, 100, end).decode()
        self.wires.append(FakeWire(self, self.queues[key][rank], self.queues[key][1 - rank]))
        return self.wires[-1]


class FakeWire:
    """One end."""

    def __init__(self, cable: Cable, out: Bytes, into: Bytes) -> None:
        self._cable = cable
        self._out = out
        self._into = into
        self.aborted = False

    def send(self, data: torch.Tensor) -> FakeFlight:
        self._out.put(data.clone())
        return FakeFlight(self, None, None)

    def receive(self, into: torch.Tensor) -> FakeFlight:
        return FakeFlight(self, self._into, into)

    def abort(self) -> bool:
        self.aborted = True
        return True

    @property
    def stuck(self) -> bool:
        return self._cable.stuck


class FakeFlight:
    """A send that is over, or a receive that looks for its bytes."""

    def __init__(self, wire: FakeWire, source: Bytes | None, into: torch.Tensor | None) -> None:
        self._wire = wire
        self._source = source
        self._into = into

    def done(self) -> bool:
        if self._wire.aborted:
            raise TransferError("the communicator was aborted")
        if self._wire.stuck:
            return False
        if self._source is None or self._into is None:
            return True
        try:
            self._into.copy_(self._source.get_nowait())
        except queue.Empty:
            return False
        return True
