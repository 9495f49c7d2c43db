# SPDX-License-Identifier: Apache-2.0
"""NVTX ranges of a transfer's phases, for Nsight Systems: with ``DYN_MIGRATE_NVTX=1`` alone.

``span`` marks work of the calling thread (gather, post, scatter, checksum); ``begin`` and ``end`` mark work elsewhere
(wire). Any thread. Needs the ``nvtx`` package; logs once that it is missing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from components import env

logger = logging.getLogger(__name__)
SWITCH = env.NVTX.name
_nothing = nullcontext()


def domain_of(wanted: bool) -> Any:
    """The package's domain for ranges of this one; None while profiling is off."""
    if not wanted:
        return None
    try:
        import nvtx
    except ImportError:
        logger.warning("%s is set, and the package nvtx is missing: pip install nvtx", SWITCH)
        return None
    return nvtx.get_domain("dynamo-migrate")


domain: Any = domain_of(env.NVTX.read())


def span(name: str, size: int = 0) -> AbstractContextManager[None]:
    """A range of the calling thread around a block; its name has ``size`` in bytes."""
    return _nothing if domain is None else _span(domain, _named(name, size))


@contextmanager
def _span(where: Any, name: str) -> Iterator[None]:
    where.push_range(where.get_event_attributes(message=name))
    try:
        yield
    finally:
        where.pop_range()


def begin(name: str, size: int = 0) -> object:
    """Begin a range that ``end`` may end on any thread."""
    where = domain
    return None if where is None else (where, where.start_range(where.get_event_attributes(message=_named(name, size))))


def end(mark: object) -> None:
    """End a range of ``begin``. Does nothing for ranges begun while profiling was off."""
    if isinstance(mark, tuple):
        where, started = mark
        where.end_range(started)


def _named(name: str, size: int) -> str:
    return f"{name} {size / 1e6:.3g} MB" if size else name
