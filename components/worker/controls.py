# SPDX-License-Identifier: Apache-2.0
"""Dynamo's control routes, as far as other workers must know of them.

A paused engine makes no tokens, so no request arrives until it is resumed.

Weights can change while a worker serves (``update_weights_from_...``, which call ``AsyncLLM.collective_rpc``), and
``sleep`` gives the memory of the KV cache back. From then on the fingerprint of the start says nothing about the
engine's KV and tokens, so it gets another one:

- files from disk: workers that have loaded the same contents in the same order have the same fingerprint, and
  exchange requests and prompts as before;
- any other change, a failed one, and ``sleep``: a fingerprint that no other worker has. Requests stay on this worker,
  and prompts are computed here, until it is started again.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import secrets
from pathlib import Path
from typing import Any, Protocol

from components.models.weights import digest

logger = logging.getLogger(__name__)
_KEEPS_WEIGHTS = frozenset(
    {
        "liveness_probe",
        "fpm_gc_stop",
        "finish_benchmark_kda_state",
        "init_broadcaster",
        "destroy_broadcaster",
        "init_weight_transfer_engine",
    }
)
"""Calls of vLLM and Dynamo into the engine's workers that change no weight."""
_FROM_DISK = "reload_weights"


class Watcher(Protocol):
    """Who must know."""

    paused: bool

    def become(self, fingerprint: str) -> None:
        """The engine has another fingerprint."""


class Controls:
    """Wraps calls of an ``AsyncLLM``. Tells nobody before ``follow``."""

    def __init__(self, llm: Any) -> None:
        self._fingerprint = ""
        self._watcher: Watcher | None = None
        self._watch_weights(llm)
        self._watch_pauses(llm)

    def _watch_weights(self, llm: Any) -> None:
        call, sleep, load = llm.collective_rpc, llm.sleep, llm.vllm_config.load_config

        @functools.wraps(call)
        async def collective_rpc(
            method: Any, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if method in _KEEPS_WEIGHTS:
                return await call(method, timeout, args, kwargs)
            before, path = self._fingerprint, (kwargs or {}).get("weights_path")
            self._alone(f"{method}: weights change")
            found = ""
            if method == _FROM_DISK and path and Path(path).is_dir():
                found = await asyncio.to_thread(digest, path, str(load.load_format))
            result = await call(method, timeout, args, kwargs)
            if found:
                self._set(hashlib.sha256(f"{before}\0{found}".encode()).hexdigest()[:32])
                logger.info("weights are those of %s: requests move between workers that have loaded them too", path)
            return result

        @functools.wraps(sleep)
        async def slept(*args: Any, **keywords: Any) -> Any:
            self._alone("sleep gives back the memory of the KV cache")
            return await sleep(*args, **keywords)

        llm.collective_rpc, llm.sleep = collective_rpc, slept

    def _watch_pauses(self, llm: Any) -> None:
        pause, resume = llm.pause_generation, llm.resume_generation

        @functools.wraps(pause)
        async def pause_generation(*args: Any, **keywords: Any) -> Any:
            self._pause(True)
            try:
                return await pause(*args, **keywords)
            except Exception:
                self._pause(False)
                raise

        @functools.wraps(resume)
        async def resume_generation(*args: Any, **keywords: Any) -> Any:
            resumed = await resume(*args, **keywords)
            self._pause(False)
            return resumed

        llm.pause_generation, llm.resume_generation = pause_generation, resume_generation

    def follow(self, fingerprint: str, watcher: Watcher) -> None:
        """``fingerprint`` is the one of the start."""
        self._fingerprint, self._watcher = fingerprint, watcher

    def _pause(self, paused: bool) -> None:
        if self._watcher is not None:
            self._watcher.paused = paused

    def _alone(self, why: str) -> None:
        logger.warning("requests of this worker stay here: %s", why)
        self._set(secrets.token_hex(16))

    def _set(self, fingerprint: str) -> None:
        self._fingerprint = fingerprint
        if self._watcher is not None:
            self._watcher.become(fingerprint)
