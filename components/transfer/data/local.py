# SPDX-License-Identifier: Apache-2.0
"""Blocks between agents of one process: copies between tensors.

Threading: worker thread; copies are made in bounded steps. CUDA copies are queued on the devices' current streams and
awaited at the end. A table of this process has all agents. Errors: ``TransferError``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from components.errors import TransferError
from components.transfer.config import TransferResult
from components.transfer.control.record import AgentRecord
from components.transfer.data.base import Backend, Copy, Steps
from components.transfer.shares import Shares

_STEP_BLOCKS = 64


def _copy_rows(copy: Copy, remote: Sequence[torch.Tensor], lane: str) -> Steps:
    """Copy block rows segment by segment."""
    local, total = copy.share.rows, 0
    sources, targets = torch.from_numpy(copy.remote), torch.from_numpy(copy.local)
    try:
        for source, target in zip(remote, local, strict=True):
            if source.shape[-1] != target.shape[-1]:
                raise TransferError(f"blocks of agent {copy.peer.name} have another size")
            for start in range(0, len(sources), _STEP_BLOCKS):
                step = slice(start, start + _STEP_BLOCKS)
                part = source.index_select(0, sources[step].to(source.device)).to(target.device)
                target.index_copy_(0, targets[step].to(target.device), part)
                total += part.numel()
                yield True
    finally:
        # Also after an error: queued copies would still write.
        for device in {row.device for row in (remote[0], local[0]) if row.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
    return TransferResult(total, len(remote) * len(copy.local), lane=lane)


class LocalBackend(Backend):
    """Copies between agents of this process."""

    lane = "local/memcpy"

    _agents: ClassVar[dict[str, Shares]] = {}
    """What each agent has, by epoch."""

    def __init__(self, epoch: str, shares: Shares) -> None:
        self._epoch = epoch
        self._agents[epoch] = shares

    def reaches(self, peer: AgentRecord) -> bool:
        """True when the peer lives in this process."""
        return peer.epoch in self._agents

    def fetch(self, copy: Copy) -> Steps:
        """See ``Backend``."""
        return _copy_rows(copy, self._agents[copy.peer.epoch].views(copy.share.remote), self.lane)

    def close(self) -> None:
        """Remove this agent from the table."""
        self._agents.pop(self._epoch, None)
