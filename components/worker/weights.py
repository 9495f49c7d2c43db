# SPDX-License-Identifier: Apache-2.0
"""Keeps workers with different weights under one name from serving at once.

Dynamo's frontends know a model by its name: they give a request, and the repeat of one that lost its worker, to any
worker of its component with that name. So a worker with new weights stays hidden from frontends until the last worker
with the old ones is gone. Of two that start together the one with the lower instance id serves. A worker that does
not answer, or does not report its weights, is ignored.

Threading: the worker's loop. Raises nothing.
"""

from __future__ import annotations

import asyncio
import logging

from components.engine.protocol import EngineInfo
from components.migration.peers import Peers, short, states_of

logger = logging.getLogger(__name__)
_LOOK_S = 1.0


async def with_others(peers: Peers, instance: int, info: EngineInfo) -> list[int]:
    """Other workers in discovery that serve the model's name with other weights."""
    others = [other for other in peers.siblings() if other != instance]
    return [
        other
        for other, state in (await states_of(peers, others)).items()
        if (its := state.info) is not None
        and its.model == info.model
        and its.weights
        and info.weights
        and its.weights != info.weights
    ]


async def until_alone(peers: Peers, instance: int, info: EngineInfo) -> None:
    """Return once no worker serves the model's name with other weights; logs those that it waits for."""
    told: list[int] = []
    while found := await with_others(peers, instance, info):
        if found != told:
            logger.warning(
                "workers %s serve %s with other weights: this one waits until they are gone, as frontends would mix "
                "their answers. For both at once give these weights another name or a namespace of their own",
                ", ".join(map(short, found)),
                info.model,
            )
            told = found
        await asyncio.sleep(_LOOK_S)
