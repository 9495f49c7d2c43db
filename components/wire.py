# SPDX-License-Identifier: Apache-2.0
"""What a decoder may raise for bytes that are no message: caught wherever bytes of others come in. No state."""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Malformed, not UTF-8 (which msgspec does not count as malformed), or nested deeper than Python's stack."""
