# SPDX-License-Identifier: Apache-2.0
"""How much longer a request will run, from those that have ended.

Output lengths are heavy-tailed: who has produced much will go on longer. The expectation is the mean of finished
outputs at first and grows with what the request has produced already.
"""

from __future__ import annotations

import numpy as np

from planner_hooks.snapshot import Floats


class RemainingEstimate:
    """Running mean with exponential forgetting; ``prior_tokens`` until something has ended."""

    def __init__(self, prior_tokens: float = 256.0, memory: float = 500.0) -> None:
        self._mean = prior_tokens
        self._memory = memory
        self._seen = 0

    def finished(self, output_tokens: float) -> None:
        """A request has ended with this many tokens."""
        self._seen += 1
        self._mean += (output_tokens - self._mean) / min(self._seen, self._memory)

    def of(self, generated: Floats) -> Floats:
        """Expected further tokens of requests that have produced so many."""
        expected: Floats = np.maximum(self._mean - generated, 0.5 * np.maximum(generated, 0.5 * self._mean))
        return expected
