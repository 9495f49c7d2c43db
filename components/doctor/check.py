# SPDX-License-Identifier: Apache-2.0
"""One line of ``dynamo doctor``."""

from __future__ import annotations

from collections.abc import Sequence
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


def exit_code(checks: Sequence[Check]) -> int:
    """1 when something fails, else 0."""
    return int(any(check.state is State.FAIL for check in checks))
