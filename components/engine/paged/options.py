# SPDX-License-Identifier: Apache-2.0
"""Sizes and speeds of a paged engine. Plain values; ``validate`` raises ``ConfigError``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from components.errors import ConfigError


@dataclass(frozen=True)
class PagedOptions:
    """See the module docstring."""

    agent: dict[str, Any]
    """Fields of ``components.transfer.AgentConfig``; the engine fills in those of the layout."""
    model: str = "paged"
    num_blocks: int = 256
    block_size: int = 16
    """Tokens per KV block."""
    max_model_len: int = 1024
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 512
    layers: int = 2
    words: int = 4
    """64-bit words per token and layer."""
    vocab_size: int = 32000
    step_s: float = 0.0
    """Duration of a step; 0: as fast as possible."""
    seed: int = 0
    integrity: str = "tail"
    """Checksums: ``tail`` (last two blocks), ``full`` or ``off``."""
    copy_deadline_s: float = 30.0
    lease_s: float = 60.0

    def validate(self) -> None:
        """Raise ``ConfigError`` naming the unusable value."""
        sizes = ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "layers")
        for name in (*sizes, "words", "vocab_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)}: 1 or more")
        if self.integrity not in ("tail", "full", "off"):
            raise ConfigError(f"integrity = {self.integrity!r}: tail, full or off")
        if self.max_model_len > self.num_blocks * self.block_size:
            raise ConfigError(
                f"max_model_len = {self.max_model_len} does not fit into {self.num_blocks} KV blocks of "
                f"{self.block_size} tokens: lower it or raise num_blocks"
            )
