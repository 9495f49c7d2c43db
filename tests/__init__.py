# SPDX-License-Identifier: Apache-2.0
"""Tests of the package."""

import os

# openai builds the classes of its answers on first use; when two threads do that at once, one of them fails. This
# builds them at import.
os.environ.setdefault("DEFER_PYDANTIC_BUILD", "false")
