# SPDX-License-Identifier: Apache-2.0
"""One connector among several that vLLM's ``MultiConnector`` runs, as for KV that is offloaded to host memory.

``MultiConnector`` hands each child its own part of a step's metadata and results. A child is found by its class, so
that scheduler and workers need not know whether there is a wrapper.

``OffloadingConnector`` goes on reading blocks of a request that has ended, until a step says that they are given to
another one. Blocks of a landing are given between steps, and written by other workers: it is told of them, and has
read them when the first copies of the next step begin (``handle_preemptions`` comes before ``start_load_kv``).
Other connectors of vLLM hold the blocks that they read, or read them within the step.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import MultiConnector, MultiKVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

T = TypeVar("T")


def child_of(connector: object, cls: type[T]) -> T | None:
    """The connector itself or the child that is of a class."""
    return next((each for each in _children(connector) if isinstance(each, cls)), None)


def results_of(results: object, cls: type[T]) -> T | None:
    """The results of one class, out of those of all connectors."""
    parts = results.metadata if isinstance(results, MultiKVConnectorWorkerMetadata) else (results,)
    return next((each for each in parts if isinstance(each, cls)), None)


def _children(connector: object) -> Iterable[object]:
    return connector.sub_connectors if isinstance(connector, MultiConnector) else (connector,)


class Neighbours:
    """Other connectors of the engine that read blocks which nobody holds."""

    def __init__(self, connector: object) -> None:
        found = [each for each in _children(connector) if isinstance(each, OffloadingConnector)]
        self._readers = [each.connector_scheduler for each in found if each.connector_scheduler is not None]
        self._fresh: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._readers)

    def given(self, blocks: Iterable[int]) -> None:
        """Note blocks that a request gets outside of a step."""
        if not self._readers:
            return
        self._fresh |= set(blocks) - {0}
        for reader in self._readers:
            reader._current_batch_allocated_block_ids.update(self._fresh)

    def step(self) -> None:
        """Note another step: its workers read the blocks before they begin a copy."""
        self._fresh.clear()

    def may_read(self, blocks: Iterable[int]) -> bool:
        """True when some of these blocks may only be written with the next step."""
        return not self._fresh.isdisjoint(blocks)
