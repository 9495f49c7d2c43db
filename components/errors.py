# SPDX-License-Identifier: Apache-2.0
"""The error tree of the package: one root, and every class tells its caller what to do.

    MigrateError                    root; ``retryable`` says whether the same call may work later
    ├── ConfigError                 the user's input is wrong: print the message, exit with 2
    ├── InvalidRequest              the client's request is wrong: HTTP 400, never retried
    ├── RequestNotFound             no such request here: it ended, or never was
    ├── Refused                     the peer will not do it, for the stated reason: try another mode
    │   ├── NoRoom                  not enough free KV blocks now; the request stays where it is
    │   └── NotMigratable           this request can never move exactly (n > 1, prompt_logprobs)
    ├── SessionError                a migration session is in another state than the call needs
    ├── EngineKiller                engines died with this request: end it, never repeat it
    ├── WorkerLost                  the worker died or cannot be reached: replay elsewhere
    ├── DeadlineExceeded            the step took longer than allowed: treat as failed, release
    └── TransferError               KV blocks could not be moved; see ``components.transfer``
        ├── TransferUnavailable     no lane or no library for what was asked; final
        ├── PeerUnknown             no record of that agent (yet); retryable
        ├── StaleEpoch              the peer restarted since the offer was made; final
        ├── IncompatibleLayout      model, dtype or layout differ; final for this pair
        ├── IntegrityError          bytes arrived but are not the right ones: recompute
        └── TransferCancelled       somebody cancelled it

Every class carries a stable ``code`` (used on the wire and as a metric label); ``from_code`` turns
what a peer sent back into the class it raised.
"""

from __future__ import annotations

from typing import ClassVar


class MigrateError(Exception):
    """Root of all errors this package raises on purpose."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class ConfigError(MigrateError):
    """A configuration value cannot be used; the message names the value and the fix."""

    code = "config"


class InvalidRequest(MigrateError):
    """The client asked for something that no worker can do; answer with HTTP 400."""

    code = "invalid_request"


class Unauthorized(MigrateError):
    """The caller does not have the secret that this system is configured with."""

    code = "unauthorized"


class RequestNotFound(MigrateError):
    """No request of that id is known here: it finished, moved away or never existed."""

    code = "request_not_found"


class WorkerNotFound(MigrateError):
    """No worker has this name, or several have; ask for the list of workers."""

    code = "worker_not_found"


class Refused(MigrateError):
    """A peer refused for the reason given; nothing was changed on either side."""

    code = "refused"


class NoRoom(Refused):
    """The destination has too few free KV blocks; the source simply keeps the request."""

    code = "no_room"
    retryable = True


class NotMigratable(Refused):
    """The request's state cannot travel exactly (n > 1, prompt_logprobs)."""

    code = "not_migratable"


class SessionError(MigrateError):
    """The call does not fit the state that the migration session is in."""

    code = "session"


class EngineKiller(MigrateError):
    """The request was in flight when several engines died: it gets an error, and no other engine."""

    code = "engine_killer"


class WorkerLost(MigrateError):
    """The worker is gone or unreachable; its requests continue by replay elsewhere."""

    code = "worker_lost"
    retryable = True


class DeadlineExceeded(MigrateError):
    """A step overran its deadline; its resources have been given back."""

    code = "deadline"
    retryable = True


class TransferError(MigrateError):
    """KV blocks could not be moved."""

    code = "transfer"
    retryable = True


class TransferUnavailable(TransferError):
    """The host or the installation cannot give the lane that was asked for."""

    code = "transfer_unavailable"
    retryable = False


class PeerUnknown(TransferError):
    """No metadata record of that agent is known; it may still appear."""

    code = "peer_unknown"


class StaleEpoch(TransferError):
    """The peer has restarted since: block ids of its old epoch mean nothing now."""

    code = "stale_epoch"
    retryable = False


class IncompatibleLayout(TransferError):
    """Model, dtype or KV layout of the two agents cannot be paired."""

    code = "incompatible_layout"
    retryable = False


class IntegrityError(TransferError):
    """The bytes that arrived are not those that were promised; recompute them."""

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
    """Rebuild the error that a peer reported; unknown codes become ``MigrateError``."""
    return _tree(MigrateError).get(code, MigrateError)(message)
