# SPDX-License-Identifier: Apache-2.0
"""Plain values of the transfer component: the configuration of an agent, the result of a transfer.

Nothing here has a life cycle or a thread. Bad values raise ``ConfigError`` when the agent starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import msgspec

from components.env import NAMESPACE_FORM
from components.errors import ConfigError

if TYPE_CHECKING:
    import torch


class Transport(StrEnum):
    """Values of ``--nixl-transport``; ``lanes.py`` has the variables of each."""

    AUTO = "auto"
    IB = "ib"
    NVLINK = "nvlink"
    TCP = "tcp"
    SHM = "shm"


class Strategy(StrEnum):
    """How blocks travel: who moves them, and whether scattered blocks are gathered first."""

    AUTO = "auto"
    READ = "read"
    """The destination reads the source's blocks where they are."""
    WRITE = "write"
    """The source writes into the destination's blocks, at its request."""
    STAGED = "staged"
    """Gathered into a buffer, written as one piece, scattered at the destination."""


class StoreKind(StrEnum):
    """Where agent records live."""

    AUTO = "auto"
    """etcd when it has endpoints, else NATS when it has a URL, else this process's memory."""
    ETCD = "etcd"
    NATS = "nats"
    MEMORY = "memory"


@dataclass(frozen=True)
class KVPool:
    """One tensor of KV blocks. ``block_dim`` is the axis that counts blocks."""

    name: str
    tensor: torch.Tensor
    num_blocks: int
    block_dim: int
    heads: int = 0
    """KV heads of the model, over all ranks; 1: every rank holds the same. 0: its blocks move between engines of equal
    tensor-parallel size only."""
    head_dim: int | None = None
    """The axis that counts this rank's heads; None: it has one."""


_TUNED = (
    *("store", "backends", "strategy", "direct_bytes", "copy_threads", "piece_bytes", "staging_bytes"),
    *("grace_s", "lease_ttl_s"),
)
_SECRETS = ("etcd_password", "nats_password", "nats_token")


class AgentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Configuration of an agent."""

    name: str
    """Unique in the namespace; a restarted worker keeps it and gets a new epoch."""
    store: StoreKind = StoreKind.AUTO
    etcd_endpoints: tuple[str, ...] = ()
    """URLs of etcd; empty and without NATS, records stay in this process (tests)."""
    etcd_user: str = ""
    etcd_password: str = ""
    etcd_ca: str = ""
    """PEM file with the authority of etcd's certificate; turns TLS on."""
    etcd_cert: str = ""
    etcd_key: str = ""
    nats_url: str = ""
    """NATS server: holds the records (JetStream) without etcd, carries change notices beside etcd."""
    nats_credentials: str = ""
    """NATS ``.creds`` file."""
    nats_user: str = ""
    nats_password: str = ""
    nats_token: str = ""
    nats_ca: str = ""
    """PEM file with the authority of the NATS server's certificate."""
    nats_cert: str = ""
    nats_key: str = ""
    namespace: str = "dynamo"
    transport: Transport = Transport.AUTO
    backends: tuple[str, ...] = ("mapped", "cuda_ipc", "nixl", "local", "tcp")
    """Lanes that may be used, best first. ``mapped`` needs host pools in shared memory, transport auto or shm and
    strategy auto; ``cuda_ipc`` needs pools on GPUs. A transport other than ``auto`` puts NIXL before ``cuda_ipc``."""
    copy_threads: int = 0
    """Threads of the ``mapped`` lane; 0: one for each core, at most eight. Fewer where engines need every core."""
    strategy: Strategy = Strategy.AUTO
    direct_bytes: int = 0
    """Mean bytes of a run of blocks from which direct descriptors are used instead of staging; 0: the measured
    default of the memory and lane (docs/design-notes.md)."""
    advertise_host: str = "127.0.0.1"
    """Address at which peers reach this host, for lanes that listen."""
    lease_ttl_s: int = 10
    fingerprint: str = ""
    block_size: int = 0
    """Tokens per KV block."""
    dtype: str = ""
    layers: int = 0
    tp_rank: int = 0
    tp_size: int = 1
    piece_bytes: int = 0
    """Bytes posted at once; 0: 32 MiB of host memory (the post itself copies), 256 MiB on a GPU."""
    staging_bytes: int = 0
    """Bound of NIXL's registered staging memory; 0: 1 GiB on a GPU, 64 MiB on a host."""
    grace_s: float = 1.0
    """Time beyond the deadline for a failed transfer's last piece to come to rest."""

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> AgentConfig:
        """From settings with texts in place of enums, as processes pass them on. Raises ``ConfigError``."""
        try:
            return msgspec.convert(dict(settings), cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"settings of the transfer agent: {error}") from error

    @staticmethod
    def tuned(settings: Mapping[str, Any]) -> dict[str, Any]:
        """From users' settings, by field name. Raises ``ConfigError`` for a field that users may not set."""
        given = {key.replace("-", "_"): value for key, value in settings.items()}
        if unknown := given.keys() - set(_TUNED):
            known = ", ".join(key.replace("_", "-") for key in _TUNED)
            raise ConfigError(f"transfer: no setting {', '.join(sorted(unknown))}; known: {known}")
        AgentConfig.of(given | {"name": "any"}).validate()
        return given

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name not in _SECRETS}
        shown["nats_url"] = "..." if "@" in self.nats_url else self.nats_url
        return f"AgentConfig({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def validate(self) -> None:
        """Raise ``ConfigError`` naming the unusable value."""
        known = {"mapped", "nixl", "local", "cuda_ipc", "tcp"}
        if not self.name or "/" in self.name or len(self.name) > 200:
            raise ConfigError(f"agent name {self.name!r}: 1 to 200 characters without '/'")
        if not NAMESPACE_FORM.fullmatch(self.namespace):
            raise ConfigError(f"namespace {self.namespace!r}: 1 to 200 letters, digits, '-', '_' and '.'")
        if not self.backends or set(self.backends) - known:
            raise ConfigError(f"backends {self.backends}: choose from {sorted(known)}")
        if not 0 <= self.tp_rank < self.tp_size:
            raise ConfigError(f"tp_rank {self.tp_rank} is not below tp_size {self.tp_size}")
        if not 0 <= self.copy_threads <= 256:
            raise ConfigError(f"copy_threads {self.copy_threads} is not within 0 and 256")
        if 0 < self.piece_bytes < 1 << 16 or self.piece_bytes < 0 or self.lease_ttl_s < 1:
            raise ConfigError("piece_bytes must be 0, or 65536 and more; lease_ttl_s 1 or more")


@dataclass(frozen=True)
class TransferResult:
    """Figures of a finished transfer. Times in seconds, of the side that moved the bytes."""

    bytes: int = 0
    descriptors: int = 0
    """Memory ranges posted, neighbours merged."""
    prep_s: float = 0.0
    post_s: float = 0.0
    wire_s: float = 0.0
    lane: str = ""
    """Backend and transport that moved the bytes."""
    strategy: Strategy = Strategy.READ
