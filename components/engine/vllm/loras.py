# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters that an engine has, at its start or loaded since, and what they are made of.

A request that moves takes the digest of its adapter along. It is let in where an adapter of that name is loaded with
the same contents, wherever it lies on that host; elsewhere it would go on with other weights under the same name.

``watch`` wraps ``AsyncLLM.add_lora``, by which Dynamo's handlers load adapters; the contents are read in a thread.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any

import msgspec
from vllm.lora.request import LoRARequest

from components.errors import ConfigError, InvalidRequest
from components.models import adapters


class Loras:
    """See the module docstring."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[LoRARequest, str]] = {}

    def watch(self, llm: Any) -> None:
        """Note every adapter that is loaded from now on."""
        original = llm.add_lora

        @functools.wraps(original)
        async def add_lora(lora_request: LoRARequest) -> Any:
            loaded = await original(lora_request)
            await self.note(lora_request)
            return loaded

        llm.add_lora = add_lora

    async def note(self, lora: LoRARequest) -> None:
        """This one is loaded; one whose files are gone already keeps its requests in place."""
        try:
            found = await asyncio.to_thread(adapters.digest, {lora.lora_name: lora.lora_path})
        except (ConfigError, OSError):
            found = ""
        self._known[lora.lora_name] = (lora, found)

    def digest(self, lora: LoRARequest) -> str:
        """Of the contents that a request of this engine uses; empty when they are not known."""
        known = self._known.get(lora.lora_name)
        return known[1] if known is not None and known[0].lora_path == lora.lora_path else ""

    def here(self, lora: LoRARequest, digest: str) -> LoRARequest:
        """This engine's own adapter for a request from elsewhere. Raises ``InvalidRequest`` when it is another one."""
        known = self._known.get(lora.lora_name)
        if known is None:
            raise InvalidRequest(f"LoRA adapter {lora.lora_name!r} is not loaded on the other worker")
        if not digest or known[1] != digest:
            raise InvalidRequest(f"LoRA adapter {lora.lora_name!r} has other contents on the other worker")
        return msgspec.structs.replace(lora, lora_path=known[0].lora_path, lora_int_id=known[0].lora_int_id)
