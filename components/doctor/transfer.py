# SPDX-License-Identifier: Apache-2.0
"""A real transfer of 64 MiB between two processes of this host, and the lane that UCX chose for it.

The requested lane proves nothing; the agent reports the one that UCX names in its log. Both processes are children,
because a native library may end them. Nothing is raised; this module sets the time-out.
"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from components.doctor.check import Check, State
from components.errors import TransferUnavailable
from components.transfer import lanes
from components.transfer.config import Transport

if TYPE_CHECKING:
    import torch

    from components.transfer import TransferAgent

_BLOCKS, _BLOCK_BYTES = 64, 1 << 20
_TIMEOUT_S = 90.0
_MORE = "UCX_LOG_LEVEL=debug UCX_LOG_FILE=/tmp/ucx.log"
"""Without the file the agent reads UCX's log itself, and shows only warnings."""
_EXPECTED = {
    Transport.IB: ("rc", "dc"),
    Transport.NVLINK: ("cuda_ipc",),
    Transport.TCP: ("tcp",),
    Transport.SHM: ("cma", "sysv", "posix", "knem", "xpmem"),
}


@dataclass(frozen=True)
class Measured:
    """Figures of the second of two transfers; the first one connects."""

    first_s: float
    seconds: float
    bytes: int
    lane: str
    right: bool


def _agent(name: str, transport: Transport, fill: int) -> tuple[TransferAgent, torch.Tensor]:
    import torch

    from components.transfer import AgentConfig, KVPool, TransferAgent

    tensor = torch.full((_BLOCKS, _BLOCK_BYTES), fill, dtype=torch.uint8)
    agent = TransferAgent(AgentConfig(name=name, backends=("nixl",), transport=transport))
    agent.start([KVPool("probe", tensor, _BLOCKS, 0)])
    return agent, tensor


def _source(pipe: Connection, transport: Transport, told: Connection) -> None:
    try:
        agent, _ = _agent("source", transport, 7)
        pipe.send(agent.record)
        agent.directory.put(pipe.recv())
        pipe.recv()
        agent.close()
    except (EOFError, ConnectionError):
        pass  # The other process has ended and, if it could, reported why.
    except Exception as error:
        told.send(f"{type(error).__name__}: {error}")


def _destination(pipe: Connection, transport: Transport, told: Connection) -> None:
    try:
        agent, tensor = _agent("destination", transport, 0)
        pipe.send(agent.record)
        record = pipe.recv()
        agent.directory.put(record)
        times, blocks = [], list(range(_BLOCKS))
        for number in range(2):
            tensor.zero_()
            began = time.perf_counter()
            result = agent.fetch(record.ref, blocks, blocks, request_id=f"doctor-{number}", deadline_s=30).wait(40)
            times.append(time.perf_counter() - began)
        told.send(Measured(times[0], times[1], result.bytes, result.lane, bool((tensor == 7).all())))
        pipe.send("end")
        agent.close()
    except (EOFError, ConnectionError):
        pass  # The other process has ended and, if it could, reported why.
    except Exception as error:
        told.send(f"{type(error).__name__}: {error}")


def transfer(transport: Transport) -> Check:
    """Run it and judge it."""
    name = f"test transfer ({transport})"
    try:
        lanes.check(transport)
    except TransferUnavailable as error:
        return Check(name, State.FAIL, str(error), "choose another --nixl-transport, or see the line of its device")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    answer, told = context.Pipe(duplex=False)
    children = [
        context.Process(target=_source, args=(there, transport, told), daemon=True),
        context.Process(target=_destination, args=(here, transport, told), daemon=True),
    ]
    for child in children:
        child.start()
    # Held by the children alone, so that the end of one is seen.
    for end in (here, there, told):
        end.close()
    try:
        found = answer.recv() if answer.poll(_TIMEOUT_S) else f"no end within {_TIMEOUT_S:g} s"
    except (EOFError, ConnectionError):
        found = "a process of the transfer has crashed"
    for child in children:
        child.join(5)
        child.kill()
    return judge(name, transport, found)


def judge(name: str, transport: Transport, measured: Measured | str) -> Check:
    """One line from what was measured, or from why nothing was."""
    if isinstance(measured, str):
        return Check(name, State.FAIL, measured, f"{_MORE} dynamo doctor tells more")
    found = (
        f"{measured.bytes / 2**20:.0f} MiB at {measured.bytes / 1e9 / measured.seconds:.2f} GB/s over {measured.lane} "
        f"(first contact {measured.first_s:.2f} s)"
    )
    if not measured.right:
        fix = "do not serve on this host: check memory and the UCX build, and report it"
        return Check(name, State.FAIL, f"wrong bytes: {found}", fix)
    _, _, used = measured.lane.partition("ucx/")
    expected = _EXPECTED.get(transport, ())
    if expected and used and not any(lane.startswith(expected) for lane in used.split("+")):
        fix = f"UCX chose something else than {transport}: see UCX_TLS and UCX_NET_DEVICES"
        return Check(name, State.WARN, found, fix)
    return Check(name, State.OK, found)
