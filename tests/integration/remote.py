# SPDX-License-Identifier: Apache-2.0
"""Asks a running graph's router on behalf of a test: one JSON array per line in, one JSON value per line out.

A process of its own, because Dynamo's runtime does not come and go within one; kept open, because a test that
acts in the middle of a stream cannot wait for an interpreter to start.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import msgspec

from components import process
from components.cli.live import join
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
            result: Any = await _call(client, name, arguments)
        except MigrateError as error:
            result = {"error": error.code, "message": str(error)}
        print(msgspec.json.encode(result).decode(), flush=True)


async def _call(client: RouterClient, name: str, arguments: list[str]) -> Any:
    match name:
        case "status":
            return await client.status()
        case "migrate":
            return await client.migrate(arguments[0], arguments[1], Mode(arguments[2]))
        case "drain":
            return await client.drain(arguments[0])
        case "undrain":
            return await client.undrain(arguments[0])
    raise ValueError(name)


join()
asyncio.run(main())
os._exit(0)
