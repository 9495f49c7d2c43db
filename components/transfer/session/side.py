# SPDX-License-Identifier: Apache-2.0
"""An agent's part in every transfer over NIXL, on either side: its memory, its link, its messages.

Runs on the worker thread.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from components.errors import TransferError
from components.transfer.control.record import AgentRecord
from components.transfer.data import ucx
from components.transfer.data.base import Copy
from components.transfer.data.nixl import NixlLink
from components.transfer.data.staging import Staging
from components.transfer.layout import Ints, extents
from components.transfer.session import messages as wire
from components.transfer.shares import Share, Shares

LANE = "nixl/ucx"


@dataclass
class Inbox:
    """Messages received for one transfer."""

    landed: set[int] = field(default_factory=set)
    freed: set[int] = field(default_factory=set)
    ended: wire.Ended | None = None
    stopped: bool = False
    greeted: bool = False


class Side:
    """See the module docstring."""

    def __init__(
        self,
        name: str,
        epoch: str,
        link: NixlLink,
        shares: Shares,
        staging: Staging | None,
        host: str,
    ) -> None:
        self.key = f"{name}/{epoch}"
        self.link = link
        self.shares = shares
        self.staging = staging
        self.host = host
        self._name = name
        self._num_blocks = shares.regions[0].rows[0].shape[0]

    def lane_of(self, operation: str, peer: AgentRecord) -> str:
        """Backend and, where known, the transports that UCX chose."""
        chosen = ucx.log.lane(operation, same_host=peer.host == self.host)
        return f"{LANE}/{chosen}" if chosen else LANE

    def prepare(self, share: Share) -> None:
        """Compile what a staged transfer of these pieces needs, ahead of the first one."""
        if self.staging is not None:
            self.staging.packing(share)

    def memory(self, copy: Copy) -> Ints:
        """Extents of the copy's blocks on both sides."""
        return extents(copy.share.local, copy.share.remote, copy.local, copy.remote)

    def send(self, peer: AgentRecord, message: wire.Message) -> None:
        """Send a message to a peer."""
        self.link.notify(peer, self.sealed(peer, message))

    def sealed(self, peer: AgentRecord, message: wire.Message) -> bytes:
        """The bytes of a message for that peer."""
        return wire.encode(message, self.key, peer.key)

    def check_blocks(self, blocks: Ints) -> None:
        """Raise ``TransferError`` for unknown blocks."""
        if len(blocks) and int(np.max(blocks)) >= self._num_blocks:
            raise TransferError(f"agent {self._name} has {self._num_blocks} blocks, not {int(np.max(blocks))}")
