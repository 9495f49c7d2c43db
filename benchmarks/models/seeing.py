# SPDX-License-Identifier: Apache-2.0
"""Small models with random weights that take images, as ``components/models/tiny.py`` makes others."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.models.tiny import sizes

_IMAGE = "<image>"
_CHAT = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}"
)


def _paddleocr_vl(tokenizer: Any, target: Path) -> None:
    """Tokens have positions in three dimensions, which follow from the images before them; 16 tokens for an image."""
    import torch

    hf: Any = importlib.import_module("transformers")
    tokenizer.add_special_tokens({"extra_special_tokens": [_IMAGE]})
    tokenizer.save_pretrained(target)
    tokenizer = hf.AutoTokenizer.from_pretrained(target, extra_special_tokens={"image_token": _IMAGE})
    tokenizer.chat_template = _CHAT
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    eye = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.PaddleOCRVLConfig(
        text_config=sizes(tokenizer)
        | {"initializer_range": 0.2, "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=eye | {"image_size": 112, "patch_size": 14},
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    hf.PaddleOCRVLForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(target)
    pixels = 112 * 112
    processor = hf.PaddleOCRVLImageProcessorPil(
        size={"shortest_edge": pixels, "longest_edge": pixels}, patch_size=14, merge_size=2
    )
    hf.PaddleOCRVLProcessor(processor, tokenizer, chat_template=_CHAT).save_pretrained(target)


SEEING: dict[str, Callable[[Any, Path], None]] = {"tiny-paddleocr-vl": _paddleocr_vl}
