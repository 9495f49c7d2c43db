# SPDX-License-Identifier: Apache-2.0
"""The policy file: the policies that run, their order and limits.

    limits:      {max-moves-per-worker: 2}
    policies:
      defragment: {}
      balance:    {start-gap: 0.25}

``load`` reads it; every mistake is a ``ConfigError`` with the key and the nearest existing one.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from components import yamltext
from components.config import dashed, nearest, validated
from components.errors import ConfigError
from planner_hooks.policies import BUILT_IN
from planner_hooks.policies.base import Policy, PolicyConfig
from planner_hooks.policies.compose import Composed
from planner_hooks.rules import Rules, ScaleDownRules


class ControllerConfig(Rules):
    """The top level of the file, without policies."""

    dry_run: bool = Field(default=False, description="Log and count plans, carry none out")
    interval_s: float = Field(default=1.0, gt=0, description="Seconds between two decisions")
    migration_timeout_s: float = Field(default=60.0, gt=0, description="A migration that takes longer counts as failed")
    drain_timeout_s: float = Field(
        default=300.0, gt=0, description="Seconds that a worker which an advisory planner retires has to drain"
    )
    failure_backoff_s: float = Field(
        default=5.0, ge=0, description="Seconds without new moves on a pair where one failed"
    )
    scale_down: ScaleDownRules = ScaleDownRules()


class PolicyFile(BaseModel):
    """A checked policy file. ``policies`` in order of precedence."""

    model_config = {"frozen": True, "arbitrary_types_allowed": True}

    controller: ControllerConfig
    policies: tuple[tuple[str, str, PolicyConfig], ...]
    """(name, module, configuration)"""

    def build(self, only: str = "") -> Composed:
        """The enabled policies, or one of them."""
        chosen: list[Policy] = [
            _class_of(name, module)(config, self.controller)
            for name, module, config in self.policies
            if config.enabled and only in ("", name)
        ]
        return Composed(chosen, self.controller)


def _class_of(name: str, module_name: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"policy {name}: there is no module {module_name!r}") from error
    if not hasattr(module, "POLICY"):
        raise ConfigError(f"policy {name}: module {module_name} names no class in POLICY")
    return module.POLICY


def _check_keys(model: type[BaseModel], where: str, values: dict[str, Any], *more: str) -> None:
    known = {dashed(name): field for name, field in model.model_fields.items()}
    for key, value in values.items():
        field = known.get(dashed(str(key)))
        if field is None:
            names = [*known, *more]
            raise ConfigError(f"{where or 'the policy file'} has no key {key!r}{nearest(str(key), names)}")
        if isinstance(value, dict) and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            _check_keys(field.annotation, f"{where}.{key}".lstrip("."), value)


def parse(values: dict[str, Any]) -> PolicyFile:
    """Check the contents of a policy file."""
    rest = {dashed(str(key)): value for key, value in values.items() if key != "policies"}
    _check_keys(ControllerConfig, "", rest, "policies")
    controller = validated(ControllerConfig, "", rest)
    named = values.get("policies", {name: {} for name in BUILT_IN})
    if not isinstance(named, dict):
        raise ConfigError("policies: expected the policies' names, each with its settings below")
    policies = []
    for name, given in named.items():
        if not isinstance(given, dict | None):
            raise ConfigError(f"policies.{name}: expected keys and values, not {given!r}")
        given = dict(given or {})
        module = given.pop("module", None) or BUILT_IN.get(str(name))
        if module is not None and (not isinstance(module, str) or module.startswith(".")):
            raise ConfigError(f"policies.{name}.module = {module!r}: the full name of a Python module")
        if module is None:
            raise ConfigError(f"there is no policy {name!r}{nearest(str(name), list(BUILT_IN))}")
        model = _class_of(name, module).config_type
        _check_keys(model, f"policies.{name}", given)
        policies.append((str(name), module, validated(model, f"policies.{name}", given)))
    _contradictions(controller, dict((name, config) for name, _, config in policies))
    return PolicyFile(controller=controller, policies=tuple(policies))


def _contradictions(controller: ControllerConfig, policies: dict[str, Any]) -> None:
    limits = controller.limits
    if limits.stale_after_s < controller.interval_s:
        raise ConfigError(
            f"limits.stale-after-s ({limits.stale_after_s:g}) is shorter than interval-s "
            f"({controller.interval_s:g}): every report would be stale; raise it"
        )
    consolidate = policies.get("consolidate")
    if consolidate is not None and getattr(consolidate, "target_usage", 0) > limits.max_destination_usage:
        raise ConfigError(
            f"policies.consolidate.target-usage ({consolidate.target_usage:g}) exceeds "
            f"limits.max-destination-usage ({limits.max_destination_usage:g}): no worker may be filled that far"
        )


def load(path: Path) -> PolicyFile:
    """Read a policy file."""
    try:
        values = yamltext.read(path) or {}
    except FileNotFoundError as error:
        raise ConfigError(f"there is no policy file {path}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: the top level must be limits, cost, policies and so on")
    return parse(values)
