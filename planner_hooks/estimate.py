# SPDX-License-Identifier: Apache-2.0
"""Estimates the remaining output of a request from ended ones.

Output lengths are heavy-tailed: a request with a long output will go on longer. The expectation begins at the mean of
finished outputs and grows with the request's output.
"""

from __future__ import annotations

import numpy as np

from planner_hooks.snapshot import Floats


class RemainingEstimate:
    """Running mean with exponential forgetting; ``prior_tokens`` until the first end."""

    def __init__(self, prior_tokens: float = 256.0, memory: float = 500.0) -> None:
        self._mean = prior_tokens
        self._memory = memory
        self._seen = 0

    def finished(self, output_tokens: float) -> None:
        """Add an ended request with its output tokens."""
        self._seen += 1
        self._mean += (output_tokens - self._mean) / min(self._seen, self._memory)

    def of(self, generated: Floats) -> Floats:
        """Expected further tokens of requests with these output tokens."""
        expected: Floats = np.maximum(self._mean - generated, 0.5 * np.maximum(generated, 0.5 * self._mean))
        return expected
