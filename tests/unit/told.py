# SPDX-License-Identifier: Apache-2.0
"""A client's stream whose outputs wait for their reader."""

from __future__ import annotations

import asyncio

from components.engine.protocol import GenerateOutput, GenerateRequest
from components.errors import MigrateError
from components.router.stream import Stream


class ToldStream(Stream):
    """See the module docstring."""

    def __init__(self, request: GenerateRequest, step_deadline_s: float) -> None:
        self.outputs: asyncio.Queue[GenerateOutput | MigrateError] = asyncio.Queue()
        super().__init__(request, step_deadline_s, self.outputs.put_nowait)
