# SPDX-License-Identifier: Apache-2.0
"""Destination blocks that a hanging peer may still write to. Thread-safe."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence


class UnsafeBlocks:
    """See the module docstring."""

    def __init__(self) -> None:
        self._blocks: Counter[int] = Counter()
        self._lock = threading.Lock()

    def blocks(self) -> frozenset[int]:
        """All blocks that must not be used yet."""
        with self._lock:
            return frozenset(self._blocks)

    def add(self, blocks: Sequence[int]) -> Callable[[], None]:
        """Mark blocks of one transfer; the result clears the mark."""
        with self._lock:
            self._blocks.update(blocks)

        def safe() -> None:
            with self._lock:
                self._blocks.subtract(blocks)
                for block in [block for block, count in self._blocks.items() if count <= 0]:
                    del self._blocks[block]

        return safe
