# SPDX-License-Identifier: Apache-2.0
"""``dynamo calibrate``: measures from when on this machine gathers blocks before a transfer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from components.errors import ConfigError
from components.transfer.config import Transport

if TYPE_CHECKING:
    from rich.progress import Progress


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

    \b
    dynamo calibrate -o calibration.json
    dynamo calibrate -o calibration.json --nixl-transport tcp --quick
    dynamo serve graphs.disagg:Frontend -f configs/disagg.yaml --Common.calibration=calibration.json
    """
    from components.transfer import calibration as files
    from components.transfer.calibrate import Grid, machine
    from components.transfer.calibrate import calibrate as measure

    if not out.absolute().parent.is_dir():
        raise ConfigError(f"{out.absolute().parent} is no folder")
    _check_device(device)
    known = files.load(str(out)) if out.exists() else files.Calibration()
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    console = Console()
    grid = Grid(total_bytes=16 << 20, repeats=3) if quick else Grid()
    with _progress(console) as progress:
        task = progress.add_task("two processes start", total=grid.points)

        def told(point: files.Point) -> None:
            sizes = f"blocks of {point.block_bytes >> 10} KiB, runs of {point.run_bytes >> 10} KiB"
            progress.update(task, advance=1, description=sizes)

        measured = measure(transport, device, grid, told)
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
    console.print(f"{out}: {explain(measured.direct_bytes)}", soft_wrap=True)
    sys.stdout.flush()
    # NIXL's native library may abort in the interpreter's finalisation.
    os._exit(0)


def _check_device(name: str) -> None:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name!r} is no device: write cpu, or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count, version = torch.cuda.device_count(), torch.__version__
        raise ConfigError(f"--device {name}: torch {version} sees {count} GPUs here; dynamo doctor tells why")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name!r} is not supported: write cpu, or cuda:0")


def _progress(console: Console) -> Progress:
    """A progress bar that a terminal shows until the end; nothing in a pipe."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def explain(direct_bytes: int) -> str:
    """The measured limit as a sentence."""
    from components.transfer.calibration import NEVER

    if not direct_bytes:
        return "blocks are always moved where they are"
    if direct_bytes == NEVER:
        return "blocks are always gathered first"
    return f"blocks are gathered first when their runs are shorter than {direct_bytes >> 10} KiB on average"
