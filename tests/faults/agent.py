# SPDX-License-Identifier: Apache-2.0
"""The transfer agent's double: one event loop, pieces of one block, faults of the scenario.

A block is read when its piece is due, not at the begin of the copy, like a remote read: a block that has been
allocated to another request meanwhile arrives with the other's bytes.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from components.errors import DeadlineExceeded, PeerUnknown, StaleEpoch, TransferCancelled, TransferError
from components.transfer import AgentConfig, KVPool, TransferResult
from components.transfer.checksum import BlockChecksums
from components.transfer.ids import AgentName, AgentRef, Epoch
from components.transfer.regions import regions_of
from components.transfer.shares import Shares


class Wire:
    """All agents of a cluster, and the faults of copies between them."""

    def __init__(self) -> None:
        self.agents: dict[str, VirtualAgent] = {}
        self.piece_s = 0.0005
        self.fail = 0.0
        """Probability that a copy fails midway."""
        self.hang = 0.0
        """Probability that a copy hangs until its deadline."""
        self.flip = 0.0
        """Probability of a flipped bit in a copy."""
        self.chance: Any = None
        self.flipped = 0
        self.held: dict[str, Callable[[int], bool]] = {}
        """Optional check that an agent's engine holds a block."""
        self.read_of_nobody = 0
        """Blocks read although their engine did not hold them."""


class Handle:
    """Result of ``fetch``."""

    def __init__(self, task: asyncio.Task[TransferResult]) -> None:
        self._task = task
        self.unsafe_blocks: tuple[int, ...] = ()

    def __await__(self) -> Generator[Any, None, TransferResult]:
        return self._outcome().__await__()

    async def _outcome(self) -> TransferResult:
        try:
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if self._task.cancelled():
                raise TransferCancelled("cancelled") from None
            raise

    def cancel(self) -> None:
        """Stop copying."""
        self._task.cancel()


class VirtualAgent:
    """The part of ``components.transfer.TransferAgent`` that the paged engine uses."""

    lanes = ("virtual",)

    def __init__(self, wire: Wire, config: AgentConfig) -> None:
        self._wire = wire
        self._config = config
        self.ref = AgentRef(AgentName(config.name), Epoch(uuid.uuid4().hex))
        self.tensors: list[Any] = []
        self._sums = BlockChecksums(Shares([]))

    def start(self, pools: Sequence[KVPool]) -> None:
        """Publish."""
        self.tensors = [pool.tensor for pool in pools]
        self._sums = BlockChecksums(Shares(regions_of(pools)))
        self._wire.agents[self._config.name] = self

    def close(self) -> None:
        """Withdraw, unless a newer life has taken the name."""
        if self._wire.agents.get(self._config.name) is self:
            del self._wire.agents[self._config.name]

    def checksums(self, blocks: Sequence[int], tokens: int = 0) -> tuple[int, ...]:
        """As the real one."""
        return self._sums.of(list(blocks))

    def unsafe_blocks(self) -> frozenset[int]:
        """Copies here never write after their end."""
        return frozenset()

    def fetch(
        self, peer: AgentRef, src: Sequence[int], dst: Sequence[int], *, request_id: str, deadline_s: float, **_: Any
    ) -> Handle:
        """Copy the peer's blocks into ours."""
        return Handle(asyncio.ensure_future(self._bounded(peer, list(src), list(dst), deadline_s)))

    async def _bounded(self, peer: AgentRef, src: list[int], dst: list[int], deadline_s: float) -> TransferResult:
        try:
            return await asyncio.wait_for(self._copy(peer, src, dst), deadline_s)
        except TimeoutError as error:
            raise DeadlineExceeded("the copy stood still") from error

    async def _copy(self, peer: AgentRef, src: list[int], dst: list[int]) -> TransferResult:
        wire, chance = self._wire, self._wire.chance
        fails = chance.random() < wire.fail
        hangs = chance.random() < wire.hang
        flips = chance.random() < wire.flip
        stop = chance.randrange(len(src)) if src else 0
        for place, (there, here) in enumerate(zip(src, dst, strict=True)):
            await asyncio.sleep(wire.piece_s)
            if place == stop and hangs:
                await asyncio.sleep(1e6)
            if place == stop and fails:
                raise TransferError("the lane broke")
            owner = wire.agents.get(peer.name)
            if owner is None:
                raise PeerUnknown(f"no record of agent {peer.name}")
            if owner.ref != peer:
                raise StaleEpoch(f"agent {peer.name} has restarted")
            for block, tensor in ((here, self.tensors[0]), (there, owner.tensors[0])):
                if not 0 <= block < len(tensor):
                    raise TransferError(f"there are {len(tensor)} blocks; {block} is none of them")
            if not self._wire.held.get(peer.name, lambda _: True)(there):
                self._wire.read_of_nobody += 1
            for mine, theirs in zip(self.tensors, owner.tensors, strict=True):
                mine[here] = theirs[there]
            if place == stop and flips:
                self.tensors[0][here, 0, 0] ^= 1 << 13
                wire.flipped += 1
        return TransferResult(bytes=len(src) * self.tensors[0][0].numel() * 8, descriptors=len(src), lane="virtual")


def spoil(agent: VirtualAgent, block: int, layer: int = 0) -> None:
    """Change one bit of a block."""
    view: Any = agent.tensors[layer].numpy().view(np.uint64)
    view[block, 0, 0] ^= np.uint64(1 << 13)
