# SPDX-License-Identifier: Apache-2.0
"""Serves the web page of a running system until SIGTERM: ``python -m components.dashboard --port 8001``."""

from __future__ import annotations

import argparse
import asyncio
import os

from components import process
from components.client import Workers
from components.dashboard.access import VARIABLE, token_for, url_of
from components.dashboard.sample import Sampler
from components.dashboard.server import Page, serve
from components.errors import ConfigError
from components.serve.state import join

_WAIT_S = 600.0
"""Wait for the first worker."""


async def main() -> None:
    """Connect, listen, wait."""
    parser = argparse.ArgumentParser(prog="python -m components.dashboard", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8001, help="port to listen on")
    parser.add_argument("--frontend", default="", help="host:port of Dynamo's frontend, for Prometheus' targets")
    arguments = parser.parse_args()
    join()
    stop = process.on_stop()
    runtime = process.connect()
    cut_off = asyncio.ensure_future(process.until_cut_off(runtime, "page"))
    sampler = Sampler(await Workers.connect(runtime, process.namespace(), _WAIT_S))
    sampling = asyncio.ensure_future(sampler.run())
    token = token_for(arguments.host)
    try:
        runner = await serve(Page(sampler, arguments.frontend, token), arguments.host, arguments.port)
    except OSError as error:
        raise ConfigError(f"the web page cannot listen: {error}; choose another --port or --host") from error
    if VARIABLE not in os.environ:
        print(f"web page: {url_of(arguments.host, arguments.port, token)}", flush=True)
    process.ready()
    await asyncio.wait([asyncio.ensure_future(stop.wait()), cut_off], return_when=asyncio.FIRST_COMPLETED)
    if not stop.is_set():
        process.end_cut_off("page")
    sampling.cancel()
    await runner.cleanup()
    # Otherwise its key in etcd would stay until the lease ends.
    runtime.shutdown()
    await asyncio.wait([cut_off], timeout=3.0)


if __name__ == "__main__":
    process.run(main)
