# SPDX-License-Identifier: Apache-2.0
"""Tests of the package."""

import os

# openai completes the classes of its answers when they are first used, which two threads may do at once: one of them
# then fails. This makes it do so at import.
os.environ.setdefault("DEFER_PYDANTIC_BUILD", "false")
