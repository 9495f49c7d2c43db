# SPDX-License-Identifier: Apache-2.0
"""Calls a running graph's workers for a test: one JSON array per line in, one JSON value per line out.

A separate process, because a process cannot make Dynamo's runtime twice; kept open, because a test in the middle of a
stream cannot wait for the start of an interpreter.
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
from components.migration.messages import Mode
from components.serve.state import join


async def main() -> None:
    """Serve until the input ends, or until Dynamo's runtime has ended with its lease in etcd."""
    runtime = process.connect()
    cut_off = asyncio.ensure_future(process.until_cut_off(runtime, "tests"))
    # It would see no workers from then on.
    cut_off.add_done_callback(lambda _: os._exit(1))
    workers = await Workers.connect(runtime, process.namespace())
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, *arguments = json.loads(line)
        try:
            await workers.refresh(decisions=True)
            result: Any = await _call(workers, name, arguments)
        except MigrateError as error:
            result = {"error": error.code, "message": str(error)}
        print(msgspec.json.encode(result).decode(), flush=True)


async def _call(workers: Workers, name: str, arguments: list[str]) -> Any:
    match name:
        case "status":
            return workers.status()
        case "migrate":
            return await workers.move(arguments[0], arguments[1], Mode(arguments[2]))
        case "migrate all":
            return await asyncio.gather(*(_moved(workers, *json.loads(move)) for move in arguments))
        case "drain":
            return (await workers.drain(arguments[0])).moves
        case "undrain":
            return await workers.undrain(arguments[0])
        case "check":
            return await workers.check(arguments[0])
    raise ValueError(name)


async def _moved(workers: Workers, request: str, source: str, target: str, mode: str) -> Any:
    try:
        return await workers.migrate(request, source, target, Mode(mode))
    except MigrateError as error:
        return {"error": error.code, "message": str(error)}


join()
asyncio.run(main())
os._exit(0)
