# SPDX-License-Identifier: Apache-2.0
"""The planner's side: a PROPOSE plugin whose every call is one decision about migrations.

Configured in the planner's file, nothing of Dynamo is changed (configs/planner.yaml, docs/planner.md):

    plugin_registration:
      in_process_plugins:
        - {module: planner_hooks.plugin, class: MigrationPlugin, plugin_id: migration, plugin_type: propose,
           priority: 50, kwargs: {policy_file: configs/policy.yaml}}

It never changes the planner's own proposal (it answers "accept") and never makes it wait: the decision runs beside
the call. A missing router or a failed decision is logged and tried again at the next tick.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path
from typing import Any

from components import process
from components.errors import MigrateError
from components.router.client import RouterClient
from planner_hooks.config import load
from planner_hooks.controller import Controller
from planner_hooks.observe import Observer
from planner_hooks.report import decisions

logger = logging.getLogger(__name__)
_CONNECT_S = 30.0


class MigrationPlugin:
    """Loaded by Dynamo's planner. Raises ``ConfigError`` at its start when the policy file is wrong."""

    def __init__(self, policy_file: str) -> None:
        self._policy = load(Path(policy_file))
        self._controller: Controller | None = None
        self._client: RouterClient | None = None
        self._deciding: asyncio.Task[None] | None = None

    async def Propose(self, request: Any) -> Any:  # noqa: N802 (Dynamo looks the method up by this name)
        """Accept the proposal as it is; decide about migrations beside it."""
        from dynamo.planner.plugins.types import AcceptResult, ProposeStageResponse

        process.ready()
        if self._deciding is None or self._deciding.done():
            self._deciding = asyncio.ensure_future(self._decide())
        return ProposeStageResponse(accept=AcceptResult())

    async def _decide(self) -> None:
        try:
            if self._controller is None or self._client is None:
                # The planner's own runtime already serves this port; the plugin is not given that runtime.
                os.environ.pop("DYN_SYSTEM_PORT", None)
                self._client = RouterClient(process.connect())
                await asyncio.wait_for(self._client.connect(), _CONNECT_S)
                self._controller = Controller(self._policy, self._client, Observer(self._policy.controller.cost))
            plan = await self._controller.tick()
            await self._client.report(decisions(plan, time.time()))
            if plan.moves or plan.retire:
                logger.info("%d moves planned; %s", len(plan.moves), self._controller.summary())
        except (MigrateError, TimeoutError) as error:
            logger.warning("no decision about migrations: %s", error or "no router answers")
        except Exception:
            # The planner must go on whatever Dynamo's client raises here.
            logger.exception("no decision about migrations")
