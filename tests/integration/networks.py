# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces as two hosts, and a cable between them: a veth pair, or one with delay and loss.

Linux's module for delay and loss, netem, is not on every machine. ``slow_cable`` therefore joins two TUN devices in
this process and handles each packet itself.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import pytest

T = TypeVar("T")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
_CLONE_NEWNET, _CLONE_NEWUTS, _CLONE_NEWNS = 0x4000_0000, 0x0400_0000, 0x0002_0000
_MS_REC, _MS_SLAVE, _MNT_DETACH = 0x4000, 0x8_0000, 2
_TUNSETIFF = 0x4004_54CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000


def run(*command: str) -> None:
    """Run a command; skip the test when the machine does not permit it."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")


@dataclass
class Cable:
    """Two namespaces; ``cut`` may be switched while it works."""

    names: tuple[str, str]
    delay_s: float = 0.0
    loss: float = 0.0
    cut: bool = False
    lost: int = 0
    passed: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def prefix(self, side: int) -> list[str]:
        """Puts a command into a namespace."""
        return ["ip", "netns", "exec", self.names[side]]


@contextmanager
def _namespaces() -> Iterator[tuple[str, str]]:
    if subprocess.run(["which", "ip"], capture_output=True).returncode:
        pytest.skip("ip is not installed (package iproute2)")
    mark = uuid.uuid4().hex[:8]
    names = (f"kv-{mark}-0", f"kv-{mark}-1")
    try:
        for name in names:
            run("ip", "netns", "add", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@contextmanager
def veth() -> Iterator[Cable]:
    """Joined by a veth pair. Cut it with ``ip link set``: see ``plug``."""
    with _namespaces() as names:
        run("ip", "link", "add", "kv0", "netns", names[0], "type", "veth", "peer", "name", "kv0", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "kv0")
            run("ip", "-n", name, "link", "set", "kv0", "up")
        yield Cable(names)


def plug(cable: Cable, there: bool) -> None:
    """Pull the veth cable out, or put it back in."""
    run("ip", "-n", cable.names[0], "link", "set", "kv0", "up" if there else "down")


@contextmanager
def slow_cable(delay_s: float, loss: float) -> Iterator[Cable]:
    """Joined by a cable with a delay each way, that loses packets at random."""
    with _namespaces() as names:
        try:
            ends = [on_host(name, _tun) for name in names]
        except OSError as error:
            pytest.skip(f"no TUN devices here: {error}")
        for name, address in zip(names, ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "kv0")
            run("ip", "-n", name, "link", "set", "kv0", "up", "mtu", "9000")
        cable = Cable(names, delay_s, loss)
        thread = threading.Thread(target=_carry, args=(cable, ends), daemon=True)
        thread.start()
        try:
            yield cable
        finally:
            cable.stopped.set()
            thread.join()
            for end in ends:
                os.close(end)


def on_host(name: str, call: Callable[[], T]) -> T:
    """Run ``call`` in a namespace, under a host name of its own. Only a thread goes in; what it starts stays inside."""

    def enter() -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        space = os.open(f"/run/netns/{name}", os.O_RDONLY)
        failed = libc.setns(space, _CLONE_NEWNET) or libc.unshare(_CLONE_NEWUTS | _CLONE_NEWNS)
        os.close(space)
        # UCX finds its network devices in /sys, which shows those of the namespace it was mounted in.
        failed = failed or libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None)
        failed = failed or libc.umount2(b"/sys", _MNT_DETACH) or libc.mount(b"none", b"/sys", b"sysfs", 0, None)
        if failed:
            raise OSError(ctypes.get_errno(), "a thread cannot enter the namespace")
        socket.sethostname(name)
        return call()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(enter).result()


def _tun() -> int:
    """A TUN device where the thread is."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", b"kv0", _IFF_TUN | _IFF_NO_PI))
    return end


def _carry(cable: Cable, ends: list[int]) -> None:
    chance = random.Random(7)
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while not cable.stopped.is_set():
        pause = min(0.05, max(0.0, waiting[0][0] - time.monotonic())) if waiting else 0.05
        for end in select.select(ends, [], [], pause)[0]:
            packet = os.read(end, 65536)
            if cable.cut or chance.random() < cable.loss:
                cable.lost += 1
                continue
            number += 1
            heapq.heappush(waiting, (time.monotonic() + cable.delay_s, number, ends[end == ends[0]], packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(waiting)
            cable.passed += 1
            try:
                os.write(end, packet)
            except OSError:
                cable.lost += 1
