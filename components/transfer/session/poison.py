# SPDX-License-Identifier: Apache-2.0
"""Destination blocks into which a peer that hangs may still write. Thread-safe."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence


class Poison:
    """See the module docstring."""

    def __init__(self) -> None:
        self._blocks: Counter[int] = Counter()
        self._lock = threading.Lock()

    def blocks(self) -> frozenset[int]:
        """All that may not be used yet."""
        with self._lock:
            return frozenset(self._blocks)

    def add(self, blocks: Sequence[int]) -> Callable[[], None]:
        """Name blocks of one transfer; what it gives takes them back."""
        with self._lock:
            self._blocks.update(blocks)

        def safe() -> None:
            with self._lock:
                self._blocks.subtract(blocks)
                for block in [block for block, count in self._blocks.items() if count <= 0]:
                    del self._blocks[block]

        return safe
