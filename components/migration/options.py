# SPDX-License-Identifier: Apache-2.0
"""Times and limits of a worker's streams and moves. Plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Times and limits; all with sane defaults."""

    orphan_s: float = 30.0
    """Time after which an arrival without a reader is given up."""
    repeats: bool = True
    """The frontend repeats requests (``--migration-limit``); else everything is relayed to its end."""
    relay_below: int = 32
    """A request with fewer tokens to come is relayed to its end: a repeat would cost more."""
    steps_ahead: int = 0
    """Of this worker's engine; see ``EngineInfo``."""
    kv_bytes_per_token: int = 0
    """Of this worker's engine; 0: copies begin without a bound."""
