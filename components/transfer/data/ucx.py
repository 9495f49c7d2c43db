# SPDX-License-Identifier: Apache-2.0
"""Reads UCX's log: the transports that it chose, and its warnings.

UCX prints, for every connection, which transports each kind of operation uses (``UCX_PROTO_INFO``). ``UcxLog``
directs that into memory and reads it. The variables are set only while a NIXL agent is made: a child process must
not inherit the descriptor. Where the user has set them, UCX prints where they say and the lane stays unknown.
Threading: one lock; any thread.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

_PLACE = re.compile(r"\|\s*\S+ (?P<where>self|intra-node|inter-node) cfg#\d+\s*\|")
_ROW = re.compile(r"\|\s*(?P<range>\d+(?:\.\.\w+)?)\s*\|\s*(?P<how>[^|]+?)\s*\|\s*(?P<lane>[^|]+?)\s*\|\s*$")
_LANE = re.compile(r"\w+/[\w:.-]+")
_TROUBLE = re.compile(r"UCX\s+(?:WARN|ERROR|FATAL)\s+(?P<text>.*)")
_OPERATIONS = {"remote memory read": "READ", "remote memory write": "WRITE"}
_libc = ctypes.CDLL(None)


class Tables:
    """Protocol tables, read line by line: lanes of large operations by place and operation."""

    def __init__(self) -> None:
        self.lanes: dict[tuple[str, str], tuple[str, ...]] = {}
        self._where = ""
        self._reading: tuple[str, str] | None = None

    def read(self, line: str) -> None:
        """Parse one line of UCX's output. The operation is beside the place, or (UCX 1.22) in the next line."""
        if place := _PLACE.search(line):
            self._where, self._reading = place["where"], None
        if operation := next((o for what, o in _OPERATIONS.items() if what in line), None):
            self._reading = (self._where, operation)
        elif self._reading and (row := _ROW.search(line)) and row["range"].endswith("inf"):
            self.lanes[self._reading] = tuple(dict.fromkeys(_LANE.findall(row["lane"])))


class UcxLog:
    """See the module docstring. One per process: UCX opens its log once."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._offset = 0
        self._rest = b""
        self._tables = Tables()
        self._lock = threading.Lock()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context in which a NIXL agent is made, so that its lanes are logged."""
        if "UCX_PROTO_INFO" in os.environ or "UCX_LOG_FILE" in os.environ:
            yield
            return
        with self._lock:
            if self._fd is None:
                self._fd = os.memfd_create("ucx-log")
            os.environ["UCX_PROTO_INFO"] = "y"
            os.environ["UCX_LOG_FILE"] = f"/proc/self/fd/{self._fd}"
            try:
                yield
            finally:
                del os.environ["UCX_PROTO_INFO"], os.environ["UCX_LOG_FILE"]

    def lane(self, operation: str, same_host: bool) -> str:
        """Transports of large READs or WRITEs, as ``cma`` or ``rc_mlx5+cuda_ipc``; empty when UCX has not said."""
        # UCX may count two network namespaces of one host as two nodes.
        places = ("intra-node", "inter-node") if same_host else ("inter-node", "intra-node")
        if (places[0], operation) not in self._tables.lanes:
            self.drain()
        with self._lock:
            found = [self._tables.lanes.get((place, operation), ()) for place in places]
        lanes = found[0] or found[1]
        return "+".join(dict.fromkeys(lane.partition("/")[0] for lane in lanes))

    def drain(self) -> None:
        """Read new lines; pass warnings on."""
        if self._fd is None:
            return
        # UCX writes through a buffer of the C library.
        _libc.fflush(None)
        with self._lock:
            while data := os.pread(self._fd, 1 << 16, self._offset):
                self._offset += len(data)
                *lines, self._rest = (self._rest + data).split(b"\n")
                for line in lines:
                    self._line(line.decode(errors="replace"))

    def _line(self, line: str) -> None:
        if trouble := _TROUBLE.search(line):
            logger.warning("UCX: %s", trouble["text"])
        else:
            self._tables.read(line)


log = UcxLog()
"""The log of this process."""
