# SPDX-License-Identifier: Apache-2.0
"""Reads an engine's output items for ``components.migration.requests``, without converting unmoved requests' ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from components.engine.protocol import GenerateOutput

T = TypeVar("T")


class Face(Protocol[T]):
    """Reads an engine's output items. The unmoved path never converts one."""

    def tokens(self, item: T) -> Sequence[int]:
        """Its new tokens."""
        ...

    def finished(self, item: T) -> bool:
        """True for the last item of its stream."""
        ...

    def without_end(self, item: T) -> T | None:
        """The item as if more followed; None when nothing is left of it."""
        ...

    def make(self, output: GenerateOutput) -> T:
        """An item from the protocol's output."""
        ...


class _ProtocolFace:
    """``Face`` of the protocol's own outputs."""

    def tokens(self, item: GenerateOutput) -> Sequence[int]:
        return item.token_ids

    def finished(self, item: GenerateOutput) -> bool:
        return item.finish_reason is not None

    def without_end(self, item: GenerateOutput) -> GenerateOutput | None:
        return msgspec.structs.replace(item, finish_reason=None, stop_reason=None) if item.token_ids else None

    def make(self, output: GenerateOutput) -> GenerateOutput:
        return output


PROTOCOL_FACE = _ProtocolFace()
