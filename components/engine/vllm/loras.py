# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of an engine, loaded at its start or later, and digests of their contents.

A request moves with the digest of its adapter. A destination accepts it only with an adapter of that name and equal
contents, in any folder; otherwise the request would continue with other weights under the same name.

``watch`` wraps ``AsyncLLM.add_lora`` and ``remove_lora``, which Dynamo's handlers call; a thread reads the contents. In
prefill workers vLLM loads an adapter with its first request instead (``learn``).
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
        """Note every adapter loaded from now on, and forget those that are removed."""
        load, remove = llm.add_lora, llm.remove_lora

        @functools.wraps(load)
        async def add_lora(lora_request: LoRARequest) -> Any:
            loaded = await load(lora_request)
            await self.note(lora_request)
            return loaded

        @functools.wraps(remove)
        async def remove_lora(lora_id: int) -> Any:
            self._known = {name: known for name, known in self._known.items() if known[0].lora_int_id != lora_id}
            return await remove(lora_id)

        llm.add_lora, llm.remove_lora = add_lora, remove_lora

    async def learn(self, lora: LoRARequest) -> None:
        """Note the adapter of a request if it is unknown."""
        if not self.digest(lora):
            await self.note(lora)

    async def note(self, lora: LoRARequest) -> None:
        """Note a loaded adapter. Without its files its requests cannot move."""
        try:
            found = await asyncio.to_thread(adapters.digest, {lora.lora_name: lora.lora_path})
        except (ConfigError, OSError):
            found = ""
        self._known[lora.lora_name] = (lora, found)

    def digest(self, lora: LoRARequest) -> str:
        """Digest of the adapter of a request; empty when unknown."""
        known = self._known.get(lora.lora_name)
        return known[1] if known is not None and known[0].lora_path == lora.lora_path else ""

    def here(self, lora: LoRARequest, digest: str) -> LoRARequest:
        """This engine's adapter for a request of another engine. Raises ``InvalidRequest`` when it differs."""
        known = self._known.get(lora.lora_name)
        if known is None:
            raise InvalidRequest(f"LoRA adapter {lora.lora_name!r} is not loaded on the other worker")
        if not digest or known[1] != digest:
            raise InvalidRequest(f"LoRA adapter {lora.lora_name!r} has other contents on the other worker")
        return msgspec.structs.replace(lora, lora_path=known[0].lora_path, lora_int_id=known[0].lora_int_id)
