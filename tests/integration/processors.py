# SPDX-License-Identifier: Apache-2.0
"""A logits processor for engines under test."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates


class Rotating(LogitsProcessor):
    """Prefers another fifth of the vocabulary for each token that the answer has so far."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._outputs: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._outputs, batch_update, lambda params, prompt, outputs: outputs)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        for row, outputs in self._outputs.items():
            logits[row, len(outputs) % 5 :: 5] += 5
        return logits
