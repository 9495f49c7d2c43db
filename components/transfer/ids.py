# SPDX-License-Identifier: Apache-2.0
"""Names of agents, in records, in offers of KV blocks and in every message between agents."""

from __future__ import annotations

from typing import NewType

import msgspec

AgentName = NewType("AgentName", str)
Epoch = NewType("Epoch", str)


class AgentRef(msgspec.Struct, frozen=True):
    """One life of one transfer agent: a restarted process has the same name and a new epoch."""

    name: AgentName
    epoch: Epoch
