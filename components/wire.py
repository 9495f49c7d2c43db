# SPDX-License-Identifier: Apache-2.0
"""Errors of decoders for bytes that are no message; caught wherever foreign bytes are read. No state."""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""Malformed, not UTF-8 (which msgspec does not count as malformed), or nested deeper than Python's stack."""
