# SPDX-License-Identifier: Apache-2.0
"""Common parts of a graph's processes: Dynamo's runtime, readiness, an orderly end.

The launcher stops a process with SIGTERM; the process drains, shuts Dynamo's runtime down (so that its keys
leave etcd at once) and ends with 0. SIGUSR1 writes a stack of each of its threads to its log.
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from components import credentials, env, output
from components.errors import MigrateError

logger = logging.getLogger(__name__)


def namespace() -> str:
    """Dynamo namespace of the workers."""
    return env.NAMESPACE.read()


def connect() -> Any:
    """Dynamo's runtime on this loop: discovery in etcd, requests over TCP."""
    from dynamo.common.utils.runtime import create_runtime

    credentials.secret()  # An unreadable secret fails here and not at the first message.

    runtime, _ = create_runtime(env.DISCOVERY.read(), env.REQUEST_PLANE.read(), event_plane="zmq")
    return runtime


async def until_cut_off(runtime: Any, what: str) -> None:
    """Return once Dynamo's runtime has ended itself because its lease in etcd is gone (for example an emptied etcd).

    A process cannot make a second runtime, so that a pure client must be restarted, like workers, whose endpoints end
    then. The end of an endpoint of this process is the sign.
    """

    async def nothing(_: Any) -> AsyncIterator[str]:
        yield ""

    await runtime.endpoint(f"{namespace()}-watch.{what}.alive").serve_endpoint(nothing)


def end_cut_off(what: str) -> NoReturn:
    """End the process after ``until_cut_off``: its launcher starts it again."""
    logger.error("this %s has lost its place in etcd; it ends, for its launcher to start it again", what)
    os._exit(1)


def on_stop() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@functools.cache
def ready() -> None:
    """Notify the launcher that this process serves. Does nothing a second time.

    Objects made so far live as long as the process, so full garbage collections skip them from now on: each one
    stopped all streams of a worker for half a second. vLLM's own server does the same.
    """
    gc.collect()
    gc.freeze()
    path = env.READY_FILE.read()
    if path:
        Path(path).touch()


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a component's main; errors of this package end it with one line and exit code 2."""
    run_blocking(lambda: uvloop.run(main()))  # type: ignore[arg-type]


def run_blocking(main: Callable[[], None]) -> None:
    """The same for a main with its own loop."""
    output.take_any_text()
    # Works also while a stuck thread holds the GIL.
    faulthandler.register(signal.SIGUSR1)
    try:
        env.check()
        logging.basicConfig(level=env.LOG.read(), format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("components").setLevel(env.LOG.read())
        logging.getLogger("httpx").setLevel(logging.WARNING)
        main()
    except MigrateError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    except KeyboardInterrupt:
        pass
    # Everything is closed. Dynamo's native runtime may abort in the interpreter's finalisation.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
