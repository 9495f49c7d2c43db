# SPDX-License-Identifier: Apache-2.0
"""Asks a system's workers on behalf of the benchmark: one JSON list per line in, one JSON value per line out.

    ["status"]                       ``components.status.Status``
    ["migrate", REQUEST, WORKER]     the move's ``MoveRecord``, or {"error": ...}

A process of its own, because Dynamo's runtime can be made only once in one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import msgspec

from components import process
from components.client import Workers
from components.errors import MigrateError


async def main() -> None:
    """Serve until the input ends."""
    workers = await Workers.connect(process.connect(), process.namespace(), 60.0)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, *arguments = json.loads(line)
        try:
            await workers.refresh(decisions=True)
            result: Any = workers.status() if name == "status" else await workers.move(arguments[0], arguments[1])
        except MigrateError as error:
            result = {"error": str(error)}
        print(msgspec.json.encode(result).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
    os._exit(0)
