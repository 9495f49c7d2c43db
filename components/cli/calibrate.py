# SPDX-License-Identifier: Apache-2.0
"""``dynamo calibrate``: when shall blocks be gathered first, on this machine?"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.errors import ConfigError
from components.transfer.config import Transport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("calibrate")(calibrate)


def calibrate(
    out: Annotated[Path, typer.Option("-o", "--out", help="file to write; other lanes in it are kept")] = Path(
        "calibration.json"
    ),
    transport: Annotated[Transport, typer.Option("--nixl-transport", help="lane to measure")] = Transport.AUTO,
    device: Annotated[str, typer.Option("--device", help="cpu, or cuda:0: where the KV blocks are")] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="a quarter of the bytes")] = False,
) -> None:
    """Measure when gathering scattered KV blocks beats moving them one by one, for workers to use.

    dynamo calibrate -o calibration.json, then: dynamo serve ... --DecodeWorker.calibration=calibration.json
    """
    from components.transfer import calibration as files
    from components.transfer.calibrate import Grid, machine
    from components.transfer.calibrate import calibrate as measure

    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.absolute().parent} is no folder")
    known = files.load(str(out)) if out.exists() else files.Calibration()
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    console = Console()
    grid = Grid(total_bytes=16 << 20, repeats=3) if quick else Grid()
    measured = measure(transport, device, grid)
    files.save(out, known.replaced(measured, machine(device)))
    table = Table(title=f"{measured.device} memory over {measured.lane or 'a lane that UCX did not name'}")
    for column in ("block KiB", "run KiB", "direct GB/s", "staged GB/s", "faster"):
        table.add_column(column, justify="right")
    for point in measured.points:
        speeds = [point.total_bytes / seconds / 1e9 for seconds in (point.direct_s, point.staged_s)]
        faster = "direct" if point.direct_s <= point.staged_s else "staged"
        sizes = (point.block_bytes >> 10, point.run_bytes >> 10)
        table.add_row(*map(str, sizes), *(f"{speed:.2f}" for speed in speeds), faster)
    console.print(table)
    console.print(f"{out}: {explain(measured.direct_bytes)}")
    sys.stdout.flush()
    # NIXL's native library may abort in the interpreter's finalisation.
    os._exit(0)


def explain(direct_bytes: int) -> str:
    """The rule in words."""
    from components.transfer.calibration import NEVER

    if not direct_bytes:
        return "blocks are always moved where they are"
    if direct_bytes == NEVER:
        return "blocks are always gathered first"
    return f"blocks are gathered first when their runs are shorter than {direct_bytes >> 10} KiB on average"
