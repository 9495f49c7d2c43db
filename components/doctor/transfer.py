# SPDX-License-Identifier: Apache-2.0
"""A real transfer between two processes of this host, and the lane that it used according to UCX.

The requested lane proves nothing: UCX prints, for every connection, which transports each kind of operation
uses (``UCX_PROTO_INFO``), and this module reads those lines. Nothing is raised; this module sets the time-out.
"""

from __future__ import annotations

import os
import subprocess
import sys

import msgspec

from components.doctor.check import Check, State
from components.doctor.probe import MARK, Measured
from components.errors import TransferUnavailable
from components.transfer import lanes
from components.transfer.config import Transport
from components.transfer.data.ucx import lanes_used

_TIMEOUT_S = 90.0
_EXPECTED = {
    Transport.IB: ("rc", "dc"),
    Transport.NVLINK: ("cuda_ipc",),
    Transport.TCP: ("tcp",),
    Transport.SHM: ("cma", "sysv", "posix", "knem", "xpmem"),
}


def transfer(transport: Transport) -> Check:
    """Run it and judge it."""
    name = f"test transfer ({transport})"
    try:
        lanes.check(transport)
    except TransferUnavailable as error:
        return Check(name, State.FAIL, str(error), "choose another --nixl-transport, or see the line of its device")
    environment = dict(os.environ) | {"UCX_PROTO_INFO": "y", "UCX_LOG_LEVEL": "info", "NIXL_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "components.doctor.probe", transport.value]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return Check(name, State.FAIL, f"no end within {_TIMEOUT_S:g} s", "run it with UCX_LOG_LEVEL=debug to see why")
    return judge(name, transport, done.stdout + done.stderr)


def judge(name: str, transport: Transport, output: str) -> Check:
    """One line from the output of the two processes."""
    marked = [line for line in output.splitlines() if line.startswith(MARK)]
    if not marked:
        lines = [line for line in output.splitlines() if line.strip() and "UCX  INFO" not in line] or ["no output"]
        return Check(name, State.FAIL, lines[-1].strip()[:300], "python -m components.doctor.probe shows everything")
    measured = msgspec.json.decode(marked[-1].removeprefix(MARK), type=Measured)
    used = lanes_used(output)
    found = (
        f"{measured.bytes / 2**20:.0f} MiB at {measured.bytes / 1e9 / measured.seconds:.2f} GB/s over "
        f"{', '.join(used) or 'a lane that UCX did not name'} (first contact {measured.first_s:.2f} s)"
    )
    if not measured.right:
        fix = "do not serve on this host: check memory and the UCX build, and report it"
        return Check(name, State.FAIL, f"wrong bytes: {found}", fix)
    expected = _EXPECTED.get(transport, ())
    if expected and used and not any(lane.startswith(expected) for lane in used):
        fix = f"UCX chose something else than {transport}: see UCX_TLS and UCX_NET_DEVICES"
        return Check(name, State.WARN, found, fix)
    return Check(name, State.OK, found)
