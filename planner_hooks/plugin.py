# SPDX-License-Identifier: Apache-2.0
"""Two plugins for Dynamo's planner, configured in the planner's file; nothing of Dynamo is changed.

    plugin_registration:
      in_process_plugins:
        - {module: planner_hooks.plugin, class: MigrationPlugin, plugin_id: migration, plugin_type: propose,
           priority: 5, needs: [observations.fpm, observations.workers], kwargs: {policy_file: configs/policy.yaml}}
        - {module: planner_hooks.plugin, class: ScaleDownPlugin, plugin_id: scale-down, plugin_type: constrain,
           priority: 5, needs: [observations.fpm, observations.workers],
           kwargs: {policy_file: configs/policy.yaml, decode_workers: [1, 4], started: {decode: 2}}}

MigrationPlugin     each call starts one decision about migrations in the background. It accepts the planner's
                    proposal, or proposes fewer workers by those that policies would retire.
ScaleDownPlugin     keeps the numbers within their bounds, and holds a reduction until it has been proposed for
                    ``delay-s`` and the other workers have room. Starting workers count as existing (``started``, or
                    the earlier number). Without bounds the planner is advisory.

Neither makes the planner wait. Both raise ``ConfigError`` at their start for a wrong policy file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from components import process
from planner_hooks.decider import Decider, Role


class MigrationPlugin:
    """For the planner's stage PROPOSE."""

    def __init__(self, policy_file: str) -> None:
        self._decider = Decider.shared(policy_file)

    async def Propose(self, request: Any) -> Any:  # noqa: N802 (Dynamo looks the method up by this name)
        """Decide about migrations; accept, or propose fewer workers by those that policies would retire."""
        from dynamo.planner.plugins.types import (
            AcceptResult,
            ComponentTarget,
            OverrideResult,
            OverrideType,
            ProposeStageResponse,
        )

        process.ready()
        observations = request.context.observations if request.context else None
        self._decider.begin(_engines(observations))
        ready = _ready(observations, "decode")
        unneeded = self._decider.unneeded()
        if not unneeded or ready is None:
            return ProposeStageResponse(accept=AcceptResult())
        fewer = ComponentTarget(
            sub_component_type="decode", replicas=max(1, ready - unneeded), type=OverrideType.AT_MOST
        )
        return ProposeStageResponse(
            override=OverrideResult(targets=[fewer], reason=f"{unneeded} workers fewer would do")
        )


class ScaleDownPlugin:
    """For the planner's stage CONSTRAIN. Bounds are (fewest, most); without them numbers are fixed."""

    def __init__(
        self,
        policy_file: str,
        decode_workers: Sequence[int] | None = None,
        prefill_workers: Sequence[int] | None = None,
        started: Mapping[str, int] | None = None,
    ) -> None:
        self._decider = Decider.shared(policy_file)
        self._decider.sets_number |= decode_workers is not None
        given = {"decode": decode_workers, "prefill": prefill_workers}
        self._roles = [Role(name, _pair(bounds), (started or {}).get(name, 0)) for name, bounds in given.items()]

    async def Constrain(self, request: Any) -> Any:  # noqa: N802 (Dynamo looks the method up by this name)
        """Bounds for each role with a known count."""
        from dynamo.planner.plugins.types import (
            AcceptResult,
            ComponentTarget,
            ConstrainStageResponse,
            OverrideResult,
            OverrideType,
        )

        context = request.context
        proposed = {t.sub_component_type: t.replicas for t in context.proposal.targets} if context.proposal else {}
        targets, reasons = [], []
        for role in self._roles:
            ready = _ready(context.observations, role.name)
            if ready is None:
                continue
            wanted = proposed.get(role.name)
            scaling = bool(getattr(context.observations.workers, f"{role.name}_scaling_in_progress", None))
            answer = self._decider.bound(role, ready if wanted is None else wanted, ready, scaling)
            reasons += [f"{role.name}: {answer.reason}"] if answer.reason else []
            for count, kind in ((answer.at_least, OverrideType.AT_LEAST), (answer.at_most, OverrideType.AT_MOST)):
                targets.append(ComponentTarget(sub_component_type=role.name, replicas=count, type=kind))
        if not targets:
            return ConstrainStageResponse(accept=AcceptResult())
        return ConstrainStageResponse(override=OverrideResult(targets=targets, reason="; ".join(reasons)))


def _pair(bounds: Sequence[int] | None) -> tuple[int, int] | None:
    return (int(bounds[0]), int(bounds[1])) if bounds else None


def _engines(observations: Any) -> Mapping[str, bytes] | None:
    return observations.fpm.decode_engines if observations is not None and observations.fpm is not None else None


def _ready(observations: Any, role: str) -> int | None:
    if observations is None or observations.workers is None:
        return None
    ready: int | None = getattr(observations.workers, f"ready_{role}")
    return ready
