# SPDX-License-Identifier: Apache-2.0
"""What happens to requests on one worker, for its metrics to count."""

from __future__ import annotations

from enum import StrEnum


class Event(StrEnum):
    """See the module docstring."""

    REPEATED = "repeated"
    """The frontend was asked to send a request again that has moved on."""
    ADOPTED = "adopted"
    """A repeat came to the worker that has the request, and goes on there."""
    PASSED_ON = "passed-on"
    """A repeat came to another worker, which relays it."""
    RECOMPUTED = "recomputed"
    """The owner of a relayed request was lost; it is computed again here."""
    LANDED = "landed"
    """A request has come in from another worker."""
    NOT_LANDED = "not-landed"
    """One was to come in, and did not."""
    ORPHANED = "orphaned"
    """A request was given up because nobody asked for its tokens."""
