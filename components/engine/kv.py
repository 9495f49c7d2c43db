# SPDX-License-Identifier: Apache-2.0
"""What two engines tell each other about one request: its KV blocks, its state, where its commit goes, its landing.

Wire structs; see ``components.engine.protocol`` for their use. No state.
"""

from __future__ import annotations

from typing import Annotated, NewType

import msgspec

from components.transfer.ids import AgentRef

RequestId = NewType("RequestId", str)


class KVGroup(msgspec.Struct, frozen=True, array_like=True):
    """A run of ``KVOffer.block_ids``: the blocks of one group of layers."""

    block_size: int
    """Tokens per block of this group."""
    first: int
    """Position of its first block; a window has left those before it."""
    count: int


class KVOffer(msgspec.Struct, frozen=True, omit_defaults=True):
    """KV blocks of a request that are readable at the source now.

    ``generation`` changes with each preemption, after which a block may belong to another request. Blocks
    copied under an older generation are copied again.
    """

    request_id: RequestId
    agents: tuple[AgentRef, ...]
    """One per tensor-parallel rank, in rank order."""
    block_size: int
    """Tokens per KV block; for several groups, a number of tokens that is whole blocks in each."""
    block_ids: tuple[int, ...]
    num_tokens: int
    """Tokens whose KV is in ``block_ids``; the last block may be partly filled."""
    generation: int
    groups: tuple[KVGroup, ...] = ()
    """Parts of ``block_ids``, group after group; empty: one group, from its first block on."""
    room_tokens: int = 0
    """Tokens for which the destination reserves blocks: those that the request has, and those that it may get
    before the commit."""


class Frozen(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole state of a frozen request: the destination continues with the next token."""

    offer: KVOffer
    output_token_ids: tuple[int, ...]
    """All output tokens, from every worker."""
    rng_state: bytes = b""
    """State of the request's random generator (torch); empty without one."""
    checksums: tuple[int, ...] = ()
    """Checksums of each block of the offer, or only of the last ones of each group, rank after rank; empty: off. A
    rank has one of each block, or one for each of its KV heads."""
    checked: tuple[int, ...] = ()
    """Number of blocks at the end of each group with checksums."""
    guide: str = ""
    """Name of what guides the request in this engine, or empty. An engine with another guide refuses it."""
    use_within_s: float = 0.0
    """Longest time for which the receiver may read the blocks: half of their lease; the other half is for messages
    on their way. 0: unknown.
    """


_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class SocketRef(msgspec.Struct, frozen=True):
    """A socket of one life of a process."""

    address: _Text
    epoch: _Text
    """The life; the handshake proves that the peer is it."""


class CommitTo(SocketRef, frozen=True):
    """Where an engine takes the commit of a landing request from the source's engine: see ``Engine.freeze``."""

    request_id: Annotated[RequestId, msgspec.Meta(max_length=1024)]
    """The engine's own id of this life of the request."""


class LandingStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """Progress of a landing request. ``landed_tokens`` counts only verified, whole transfers."""

    reserved: bool
    landed_tokens: int = 0
    in_flight: bool = False
    rounds: int = 0
    bytes: int = 0
    descriptors: int = 0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""
    error: tuple[str, str] | None = None
    """(code, message) of the last failed round; the blocks it covered count as not landed."""
    commit_to: CommitTo | None = None
    """Where the source's engine may send the commit; None where an engine takes commits only from its worker."""
    direct: bool = False
    """The commit came from the source's engine, before the call ``commit``."""

    @property
    def landed(self) -> bool:
        """True when the request has its blocks and no round runs."""
        return self.reserved and not self.in_flight

    def after(self, size: int, descriptors: int, post_s: float, wire_s: float, lane: str) -> LandingStatus:
        """With what one more copy has moved."""
        return msgspec.structs.replace(
            self,
            bytes=self.bytes + size,
            descriptors=self.descriptors + descriptors,
            post_s=self.post_s + post_s,
            wire_s=self.wire_s + wire_s,
            lane=lane or self.lane,
        )
