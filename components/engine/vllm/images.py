# SPDX-License-Identifier: Apache-2.0
"""Images of a prompt, as another engine takes them: vLLM makes the same tokens and features of them there.

So the request there is like any other of its engine: its KV is copied, and an image is encoded again only if blocks
are lost. Pixels travel as they are. Video, audio and embeddings do not: their requests stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from PIL import Image as Pixels

from components.errors import InvalidRequest

MAX_BYTES = 12 << 20
"""Of all images of a request."""
MORE = "the prompt has more than token ids and images (video, audio, embeddings): only its KV has all of it"
"""Why most prompts with more than token ids stay."""
_BANDS = {"L": 1, "RGB": 3, "RGBA": 4}
_DATA, _UUIDS, _PROCESSOR = "multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs"
KEYS = frozenset({_DATA, _UUIDS, _PROCESSOR})
"""What a prompt has besides its tokens when it has images."""


class Image(msgspec.Struct, frozen=True, array_like=True):
    """One, row by row."""

    mode: str
    width: int
    height: int
    data: bytes


class Images(msgspec.Struct, frozen=True, omit_defaults=True):
    """All images of a prompt, and its tokens as vLLM was given them: with one placeholder for each."""

    token_ids: tuple[int, ...]
    images: tuple[Image, ...]
    uuids: dict[str, list[str | None]] | None = None
    processor: dict[str, Any] | None = None

    def prompt(self, output_token_ids: Sequence[int]) -> dict[str, Any]:
        """For ``AsyncLLM.generate``. Raises ``InvalidRequest`` for a malformed image."""
        prompt: dict[str, Any] = {
            "prompt_token_ids": [*self.token_ids, *output_token_ids],
            _DATA: {"image": [_pixels(image) for image in self.images]},
        }
        if self.uuids is not None:
            prompt[_UUIDS] = self.uuids
        if self.processor is not None:
            prompt[_PROCESSOR] = self.processor
        return prompt


def _pixels(image: Image) -> Pixels.Image:
    size = image.width * image.height * _BANDS.get(image.mode, 0)
    if min(image.width, image.height) <= 0 or size != len(image.data):
        shape = f"{image.mode[:8]} {image.width} x {image.height}"
        raise InvalidRequest(f"an image {shape} of {len(image.data)} bytes")
    return Pixels.frombytes(image.mode, (image.width, image.height), image.data)


def _given(prompt: Any) -> list[Any]:
    """The images of a prompt; none where it has something else."""
    data = prompt.get(_DATA) if isinstance(prompt, Mapping) else None
    if not isinstance(data, Mapping) or set(data) != {"image"}:
        return []
    images = data["image"] if isinstance(data["image"], list) else [data["image"]]
    return images if all(isinstance(image, Pixels.Image) and image.mode in _BANDS for image in images) else []


def why_stay(prompt: Any) -> str:
    """Why what this prompt has besides token ids cannot travel; empty if it can."""
    images = _given(prompt)
    if not images or not isinstance(prompt.get("prompt_token_ids"), list):
        return MORE
    size = sum(image.width * image.height * _BANDS[image.mode] for image in images)
    return f"images of {size} bytes: {MAX_BYTES} can travel" if size > MAX_BYTES else ""


def of_prompt(prompt: Mapping[str, Any]) -> Images | None:
    """The images of a prompt that can travel; None where there are none."""
    images = _given(prompt)
    if not images:
        return None
    return Images(
        tuple(prompt["prompt_token_ids"]),
        tuple(Image(image.mode, image.width, image.height, image.tobytes()) for image in images),
        prompt.get(_UUIDS),
        prompt.get(_PROCESSOR),
    )
