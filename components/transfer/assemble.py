# SPDX-License-Identifier: Apache-2.0
"""Assembles an agent: the lanes that this host and installation have, and the record that lists them.

Called once, at start. Raises ``TransferUnavailable`` when a named transport or every way is missing.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from components.errors import TransferUnavailable
from components.transfer import lanes
from components.transfer.config import AgentConfig, KVPool, Strategy, Transport
from components.transfer.control.directory import Directory
from components.transfer.control.record import AgentRecord, RegionRecord
from components.transfer.data.base import Backend
from components.transfer.data.hostcopy import HostCopier, copier_is_available, threads_for
from components.transfer.data.ipc import IpcBackend
from components.transfer.data.local import LocalBackend
from components.transfer.data.mapped import MappedBackend
from components.transfer.data.nixl import NixlLink, nixl_is_available
from components.transfer.data.shared import shared_storages
from components.transfer.data.staging import Staging
from components.transfer.data.tcp import TcpBackend
from components.transfer.heads import Rank
from components.transfer.layout import Region
from components.transfer.regions import regions_of, storages_of
from components.transfer.session.backend import NixlBackend
from components.transfer.session.side import Side
from components.transfer.shares import Shares, divided

logger = logging.getLogger(__name__)

_PASSIVE_WORK = frozenset({Transport.TCP, Transport.IB, Transport.NVLINK})
"""Transports with which the side that is read from takes part in moving the bytes."""
_PIECE_BYTES = {"cuda": 256 << 20, "cpu": 32 << 20}
_STAGING_BYTES = {"cuda": 1 << 30, "cpu": 64 << 20}


@dataclass(frozen=True)
class Assembly:
    """An agent's lanes, best first, and its record."""

    backends: list[Backend]
    record: AgentRecord | None
    shares: Shares = Shares([])


def _order(config: AgentConfig) -> list[str]:
    """The configured backends. A transport chosen by name puts NIXL (and ``mapped``) first."""
    named = config.transport is not Transport.AUTO
    return sorted(config.backends, key=lambda name: named and name not in ("mapped", "nixl"))


def host_id() -> str:
    """Id of the machine, equal in all its processes and containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.is_file() else socket.gethostname()


def assemble(config: AgentConfig, epoch: str, pools: Sequence[KVPool], directory: Directory) -> Assembly:
    """Register the pools with every configured lane that is available."""
    lanes.check(config.transport)
    if not pools:
        raise TransferUnavailable("an agent needs at least one KV pool")
    regions = regions_of(pools)
    rank = Rank(config.tp_rank, config.tp_size)
    shares = Shares(regions, rank, divided(pools, regions, rank), config.name)
    host = host_id()
    backends: list[Backend] = []
    blob, address, scope, stages = b"", "", "", False
    ipc: tuple[bytes, ...] = ()
    for name in _order(config):
        if name == "mapped" and (mapped := _mapped(config, epoch, host, pools)) is not None:
            backends.append(mapped)
            scope = mapped.scope
        elif name == "nixl" and (nixl := _nixl(config, epoch, host, shares, pools, directory)) is not None:
            backends.append(nixl)
            blob, stages = nixl.side.link.blob(), nixl.side.staging is not None
        elif name == "local":
            backends.append(LocalBackend(epoch, shares))
        elif name == "cuda_ipc" and (own := _ipc(host, shares, pools)) is not None:
            backends.append(own)
            ipc = own.handles
        elif name == "tcp":
            tcp = TcpBackend(config.name, epoch, shares, config.advertise_host, directory)
            backends.append(tcp)
            address = tcp.address
    if not backends:
        raise TransferUnavailable(f"none of the backends {config.backends} is there: {nixl_is_available()[1]}")
    record = AgentRecord(
        name=config.name,
        epoch=epoch,
        started=time.time(),
        host=host,
        blob=blob,
        tcp_address=address,
        ipc=ipc,
        fingerprint=config.fingerprint,
        block_size=config.block_size,
        dtype=config.dtype,
        layers=config.layers,
        num_blocks=regions[0].rows[0].shape[0],
        tp_rank=config.tp_rank,
        tp_size=config.tp_size,
        regions=tuple(_published(region) for region in regions),
        lanes=tuple(backend.lane for backend in backends),
        scope=scope,
        stages=stages,
        pools=shares.pools,
    )
    return Assembly(backends, record, shares)


def _published(region: Region) -> RegionRecord:
    device = region.device
    segments = tuple((s.address, s.stride, s.length) for s in region.segments)
    return RegionRecord(region.name, device.type, device.index or 0, region.order, segments)


def _mapped(config: AgentConfig, epoch: str, host: str, pools: Sequence[KVPool]) -> MappedBackend | None:
    # A transport or strategy chosen by name is one of NIXL's.
    if config.transport not in (Transport.AUTO, Transport.SHM) or config.strategy is not Strategy.AUTO:
        return None
    storages = shared_storages(pools)
    if not storages:
        return None
    available, why = copier_is_available()
    if not available:
        logger.info("the pools are in shared memory, but %s; using other lanes", why)
        return None
    copier = HostCopier(threads_for(config.copy_threads))
    return MappedBackend(host, epoch, storages, copier)


def _nixl(
    config: AgentConfig,
    epoch: str,
    host: str,
    shares: Shares,
    pools: Sequence[KVPool],
    directory: Directory,
) -> NixlBackend | None:
    available, why = nixl_is_available()
    if not available:
        logger.warning("NIXL is not used: %s; falling back to other lanes", why)
        return None
    os.environ.update(lanes.environment(config.transport, os.environ))
    where = shares.regions[0].device
    device = where.type
    staging = None
    if _may_stage(config, device):
        limit = config.staging_bytes or _STAGING_BYTES.get(device, 64 << 20)
        staging = Staging(shares.regions, limit)
    memory = [*storages_of(pools), *([staging.memory] if staging else [])]
    own_thread = config.transport in _PASSIVE_WORK
    piece = config.piece_bytes or _PIECE_BYTES.get(device, 32 << 20)
    link = NixlLink(f"{config.name}/{epoch}", memory, where, piece, own_thread)
    return NixlBackend(config, Side(config.name, epoch, link, shares, staging, host), directory)


def _may_stage(config: AgentConfig, device: str) -> bool:
    if config.strategy is Strategy.AUTO:
        return device == "cuda" or config.direct_bytes > 0
    return config.strategy is Strategy.STAGED


def _ipc(host: str, shares: Shares, pools: Sequence[KVPool]) -> IpcBackend | None:
    if shares.regions[0].device.type != "cuda":
        return None
    try:
        return IpcBackend(host, shares, pools)
    except RuntimeError as error:
        logger.warning("device memory cannot be shared between processes, other lanes move its blocks: %s", error)
        return None
