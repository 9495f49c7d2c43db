# SPDX-License-Identifier: Apache-2.0
"""One line of ``dynamo doctor``."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class State(StrEnum):
    """``SKIP``: not needed here. ``WARN``: works, but not as well as it could. ``FAIL``: will not work."""

    OK = "ok"
    SKIP = "skip"
    WARN = "warn"
    FAIL = "fail"


class Check(msgspec.Struct, frozen=True):
    """What is checked, what was found, and the fix (for ``WARN`` and ``FAIL``)."""

    name: str
    state: State
    found: str
    fix: str = ""


def checked(name: str, good: bool, found: str, fix: str, bad: State = State.WARN) -> Check:
    """``OK`` without a fix when it is good, else ``bad`` with it."""
    return Check(name, State.OK, found) if good else Check(name, bad, found, fix)
