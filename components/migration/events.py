# SPDX-License-Identifier: Apache-2.0
"""Events of requests on one worker, which its metrics count."""

from __future__ import annotations

from enum import StrEnum


class Event(StrEnum):
    """See the module docstring."""

    REPEATED = "repeated"
    """The frontend was asked to repeat a moved request."""
    ADOPTED = "adopted"
    """A repeat reached the owner of the request and continues there."""
    PASSED_ON = "passed-on"
    """A repeat reached another worker, which relays it."""
    RECOMPUTED = "recomputed"
    """The owner of a relayed request was lost; this worker computes it again."""
    LANDED = "landed"
    """A request arrived from another worker."""
    NOT_LANDED = "not-landed"
    """An arrival failed."""
    ORPHANED = "orphaned"
    """A request without a reader was given up."""
