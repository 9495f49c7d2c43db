# SPDX-License-Identifier: Apache-2.0
"""NVTX ranges of a transfer's phases, for Nsight Systems: with ``DYN_MIGRATE_NVTX=1`` alone.

``span`` marks work of the calling thread (gather, post, scatter, checksum); ``begin`` and ``end`` mark work elsewhere
(wire). Any thread. Needs the ``nvtx`` package; logs once that it is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

from components import env

logger = logging.getLogger(__name__)
SWITCH = env.NVTX.name
DOMAIN = "dynamo-migrate"


class Sink(Protocol):
    """Receives ranges."""

    def push(self, name: str) -> None:
        """Begin a range of this thread, inside its open ones."""
        ...

    def pop(self) -> None:
        """End this thread's innermost range."""
        ...

    def start(self, name: str) -> object:
        """Begin a range that may end on any thread, in any order."""
        ...

    def stop(self, mark: object) -> None:
        """End such a range."""
        ...


class _Package:
    """The ``nvtx`` package: ranges in a domain of their own."""

    def __init__(self) -> None:
        import nvtx

        self._domain: Any = nvtx.get_domain(DOMAIN)

    def push(self, name: str) -> None:
        self._domain.push_range(self._domain.get_event_attributes(message=name))

    def pop(self) -> None:
        self._domain.pop_range()

    def start(self, name: str) -> object:
        return self._domain.start_range(self._domain.get_event_attributes(message=name))

    def stop(self, mark: object) -> None:
        self._domain.end_range(mark)


def sink_of(wanted: bool) -> Sink | None:
    """The sink that the switch selects."""
    if not wanted:
        return None
    try:
        return _Package()
    except ImportError:
        logger.warning("%s is set, and the package nvtx is missing: pip install nvtx", SWITCH)
        return None


_sink: Sink | None = sink_of(env.NVTX.read())
_nothing = nullcontext()


def use(sink: Sink | None) -> Sink | None:
    """Send ranges to another sink. Returns the previous one."""
    global _sink
    before, _sink = _sink, sink
    return before


def span(name: str, size: int = 0) -> AbstractContextManager[None]:
    """A range of the calling thread around a block; its name has ``size`` in bytes."""
    return _nothing if _sink is None else _span(_sink, _named(name, size))


@contextmanager
def _span(sink: Sink, name: str) -> Iterator[None]:
    sink.push(name)
    try:
        yield
    finally:
        sink.pop()


def begin(name: str, size: int = 0) -> object:
    """Begin a range that ``end`` may end on any thread."""
    sink = _sink
    return None if sink is None else (sink, sink.start(_named(name, size)))


def end(mark: object) -> None:
    """End a range of ``begin``. Does nothing for ranges begun while profiling was off."""
    if isinstance(mark, tuple):
        sink, started = mark
        sink.stop(started)


def _named(name: str, size: int) -> str:
    return f"{name} {size / 1e6:.3g} MB" if size else name
