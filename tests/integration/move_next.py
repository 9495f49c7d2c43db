# SPDX-License-Identifier: Apache-2.0
"""Moves the next request that decodes somewhere to the other decode worker; prints the record as JSON."""

from __future__ import annotations

import asyncio
import os
import sys

import msgspec

from components import process
from components.cli.live import join
from components.messages import Mode, MoveRecord
from components.router.client import RouterClient


async def move(mode: Mode) -> MoveRecord:
    """Wait for a request that has some output, then move it."""
    client = RouterClient(process.connect())
    await client.connect()
    print("ready", flush=True)
    while True:
        status = await client.status()
        decode = [w.worker for w in status.workers if w.role == "decode"]
        for stream in status.streams:
            if stream.worker in decode and stream.output_tokens > 20:
                target = next(worker for worker in decode if worker != stream.worker)
                return await client.migrate(stream.request_id, target, mode)
        await asyncio.sleep(0.02)


join()
print(msgspec.json.encode(asyncio.run(move(Mode(sys.argv[1])))).decode(), flush=True)
os._exit(0)
