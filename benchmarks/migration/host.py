# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``OffloadingConnector`` on CPUs: vLLM's worker copies only between GPUs and host memory, this one any memory.

The connector's configuration names it (``spec_module_path``, ``spec_name``); scheduler, cache policy and protocol stay
vLLM's. A store is copied as late as vLLM allows, as on a GPU with a backlog of copies, and must have the bytes of its
submission: if a block was written to in between, the engine ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import torch
from vllm.v1.kv_offload.base import CanonicalKVCaches, GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

_LATE = 3
"""Steps for which a store waits."""


class HostSpec(CPUOffloadingSpec):
    """As vLLM's, on any platform."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """One worker's copies."""
        if self.blocks_per_chunk != 1:
            raise ValueError("chunks of several blocks are not copied here: leave blocks_per_chunk out")
        return HostWorker(kv_caches, self.num_chunks)


class HostWorker(OffloadingWorker):
    """Copies on the step's thread."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._caches = [each.tensor for each in kv_caches.tensors]
        self._host = [torch.empty((chunks, cache.shape[1]), dtype=torch.int8) for cache in self._caches]
        self._groups = [sorted({ref.tensor_idx for ref in refs}) for refs in kv_caches.group_data_refs]
        self._stores: deque[tuple[int, int, GPULoadStoreSpec, LoadStoreSpec, list[int]]] = deque()
        self._done: list[TransferResult] = []
        self._steps = 0

    def _pairs(self, here: GPULoadStoreSpec, there: LoadStoreSpec) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        blocks = list(zip(here.block_ids.tolist(), there.block_ids.tolist(), strict=True))  # type: ignore[attr-defined]
        for tensors, size in zip(self._groups, here.group_sizes, strict=True):
            for block, chunk in blocks[:size]:
                for index in tensors:
                    yield self._caches[index][block], self._host[index][chunk]
            del blocks[:size]

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Queue a copy."""
        sums = [_sum(page) for page, _ in self._pairs(src_spec, dst_spec)]
        self._stores.append((job_id, self._steps, src_spec, dst_spec, sums))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Copy back."""
        begun, size = time.perf_counter(), 0
        for page, kept in self._pairs(dst_spec, src_spec):
            page.copy_(kept)
            size += page.nbytes
        self._done.append(TransferResult(job_id, True, size, time.perf_counter() - begun))
        return True

    def get_finished(self) -> list[TransferResult]:
        """Called once a step."""
        self._steps += 1
        while self._stores and self._stores[0][1] + _LATE <= self._steps:
            self._store()
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Copy these now; older ones come first."""
        while any(job[0] in job_ids for job in self._stores):
            self._store()

    def _store(self) -> None:
        job_id, _, here, there, sums = self._stores.popleft()
        begun, size = time.perf_counter(), 0
        for (page, kept), expected in zip(self._pairs(here, there), sums, strict=True):
            if _sum(page) != expected:
                raise RuntimeError("a block was written before it had been offloaded")
            kept.copy_(page)
            size += page.nbytes
        self._done.append(TransferResult(job_id, True, size, time.perf_counter() - begun))


def _sum(page: torch.Tensor) -> int:
    return int(page.view(torch.int32).sum(dtype=torch.int64))
