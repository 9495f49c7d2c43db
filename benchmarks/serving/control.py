# SPDX-License-Identifier: Apache-2.0
"""Asks a system's router on behalf of the benchmark: one JSON list per line in, one JSON value per line out.

    ["status"]                       the router's ``RouterReply``
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
from components.errors import MigrateError
from components.messages import Mode
from components.router.client import RouterClient


async def main() -> None:
    """Serve until the input ends."""
    client = RouterClient(process.connect())
    await client.connect()
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, *arguments = json.loads(line)
        try:
            result: Any = await (
                client.status() if name == "status" else client.migrate(arguments[0], arguments[1], Mode.LIVE)
            )
        except MigrateError as error:
            result = {"error": str(error)}
        print(msgspec.json.encode(result).decode(), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
    os._exit(0)
