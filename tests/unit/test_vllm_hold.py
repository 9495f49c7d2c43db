# SPDX-License-Identifier: Apache-2.0
"""An engine core's pauses for commits: bounded, not nested, at most half of the time. Virtual time."""

from __future__ import annotations

import queue
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from components.engine.kv import RequestId
from components.engine.vllm.control import Call, Op

pytest.importorskip("vllm")
from components.engine.vllm.compat import core as module  # noqa: E402


class Core:
    """As much of an engine core as a pause needs; what clients send are functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.hold = module.Hold()
        self.expected = {"a", "b"}
        self.sent: list[Callable[[], object]] = []
        self.input_queue = self
        migration = SimpleNamespace(expects_commit=self.expected.__contains__, take_commits=lambda: None)
        self.scheduler = SimpleNamespace(migration=migration)

    def get(self, timeout: float) -> tuple[Any, Any]:
        if self.sent:
            return None, self.sent.pop(0)
        self.now += timeout
        raise queue.Empty

    def _handle_client_request(self, _: Any, call: Callable[[], object]) -> None:
        call()

    def pause(self, name: str, hold_s: float) -> float:
        began, core = self.now, self
        self.hold.until_commit(core, Call(Op.EXPECT_COMMIT, RequestId(name), hold_s=hold_s))  # type: ignore[arg-type]
        return self.now - began


def test_the_commit_ends_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch)
    core.sent = [lambda: core.expected.remove("a")]
    assert core.pause("a", 60.0) == 0


def test_a_pause_is_bounded_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Core(monkeypatch).pause("a", 60.0) == module.MAX_HOLD_S == 0.25


def test_a_second_call_does_not_prolong_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch)
    core.sent = [lambda: core.pause("b", 60.0)] * 16
    assert core.pause("a", 0.2) == pytest.approx(0.2)


def test_the_engine_runs_between_two_pauses_for_as_long_as_they_last(monkeypatch: pytest.MonkeyPatch) -> None:
    core = Core(monkeypatch)
    core.pause("a", 0.2)
    assert core.pause("b", 0.2) == 0
    core.now += 0.05
    assert core.pause("b", 0.2) == pytest.approx(0.05)
    core.now += 10.0
    assert core.pause("b", 0.2) == pytest.approx(0.2)
