# SPDX-License-Identifier: Apache-2.0
"""Sessions with a server that may become unreachable: restarted without end, ended together, closed quietly."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.2
_LAST_DELAY_S = 5.0


def _ignore(_: Exception) -> None:
    """Nobody waits for this one."""


async def forever(
    where: str, session: Callable[[], Awaitable[None]], failed: Callable[[Exception], None] = _ignore
) -> None:
    """Run a session again whenever it ends, until cancelled. ``failed`` is called with the reason."""
    delay = _FIRST_DELAY_S
    while True:
        began = asyncio.get_running_loop().time()
        try:
            await session()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            # Retry whatever the client library raises: known peers go on working meanwhile.
            logger.warning("%s: %s; trying again", where, str(error) or type(error).__name__)
            failed(error)
        if asyncio.get_running_loop().time() - began > _LAST_DELAY_S:
            delay = _FIRST_DELAY_S
        await asyncio.sleep(delay)
        delay = min(delay * 2, _LAST_DELAY_S)


async def first_of(*jobs: Awaitable[None]) -> None:
    """Run jobs until one ends, then end the others. Raises what the first one raised."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def quietly(work: Awaitable[object]) -> None:
    """Await something whose failure no longer matters."""
    try:
        await work
    except Exception as error:
        logger.debug("while leaving a store: %s", error)
