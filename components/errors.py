# SPDX-License-Identifier: Apache-2.0
"""The error tree of the package: one root; every class implies the caller's reaction.

``retryable`` says whether the same call may work later. Every class has a stable ``code`` (on the wire and as a metric
label); ``from_code`` restores a peer's error from it.
"""

from __future__ import annotations

from typing import ClassVar


class MigrateError(Exception):
    """Root of all deliberate errors of this package."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class ConfigError(MigrateError):
    """An unusable configuration value; the message has the value and the fix. Commands print it and exit with 2."""

    code = "config"


class InvalidRequest(MigrateError):
    """A request that no worker can serve; answer with HTTP 400."""

    code = "invalid_request"


class Unauthorized(MigrateError):
    """The caller lacks this system's secret."""

    code = "unauthorized"


class RequestNotFound(MigrateError):
    """No request with that id is here: it has ended, has moved away or never existed."""

    code = "request_not_found"


class WorkerNotFound(MigrateError):
    """None or several workers have this name; list the workers."""

    code = "worker_not_found"


class Refused(MigrateError):
    """A peer refused for the given reason; nothing has changed on either side. Try another mode."""

    code = "refused"


class NoRoom(Refused):
    """The destination has too few free KV blocks; the source keeps the request."""

    code = "no_room"
    retryable = True


class NotMigratable(Refused):
    """The request's state cannot travel exactly (n > 1, prompt_logprobs)."""

    code = "not_migratable"


class SessionError(MigrateError):
    """The call does not fit the state of the migration session."""

    code = "session"


class EngineKiller(MigrateError):
    """The request was in flight when several engines died: it gets an error, and no other engine."""

    code = "engine_killer"


class WorkerLost(MigrateError):
    """The worker is gone or unreachable; its requests continue by replay elsewhere."""

    code = "worker_lost"
    retryable = True


class DeadlineExceeded(MigrateError):
    """A step exceeded its deadline; its resources are free."""

    code = "deadline"
    retryable = True


class TransferError(MigrateError):
    """KV blocks could not be moved."""

    code = "transfer"
    retryable = True


class TransferUnavailable(TransferError):
    """The host or installation lacks the requested lane."""

    code = "transfer_unavailable"
    retryable = False


class PeerUnknown(TransferError):
    """No record of that agent is known; it may still appear."""

    code = "peer_unknown"


class StaleEpoch(TransferError):
    """The peer has restarted: block ids of its old epoch are invalid."""

    code = "stale_epoch"
    retryable = False


class IncompatibleLayout(TransferError):
    """Model, dtype or KV layout of the two agents cannot be paired."""

    code = "incompatible_layout"
    retryable = False


class IntegrityError(TransferError):
    """The bytes differ from the source's; recompute them."""

    code = "integrity"
    retryable = False


class TransferCancelled(TransferError):
    """The transfer was cancelled before it completed."""

    code = "cancelled"
    retryable = False


def _tree(cls: type[MigrateError]) -> dict[str, type[MigrateError]]:
    found = {cls.code: cls}
    for sub in cls.__subclasses__():
        found.update(_tree(sub))
    return found


def from_code(code: str, message: str) -> MigrateError:
    """Restore a peer's error; unknown codes become ``MigrateError``."""
    return _tree(MigrateError).get(code, MigrateError)(message)
