# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.transfer --quick --json out.json --plot out.png``"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.graph import machine
from benchmarks.transfer.measure import PLAIN, Row, collective, measure, pair, plain_copy
from benchmarks.transfer.nvlink import topology
from benchmarks.transfer.peer import SHAPES
from components.transfer import Strategy, Transport

_NIXL: dict[str, Any] = {"backends": ("nixl",)}
_METHODS: dict[str, dict[str, Any]] = {
    "auto": {},
    "read": _NIXL | {"strategy": Strategy.READ},
    "write": _NIXL | {"strategy": Strategy.WRITE},
    "staged": _NIXL | {"strategy": Strategy.STAGED},
    "cuda_ipc": {"backends": ("cuda_ipc",)},
    "tcp sockets": {"backends": ("tcp",)},
    "stock": _NIXL | {"strategy": Strategy.READ, "piece_bytes": 1 << 40},
}
_COLLECTIVES = ("gloo send/recv", "nccl send/recv", "nccl all-gather")


class Report(msgspec.Struct):
    """Raw samples and where they come from."""

    machine: dict[str, str]
    device: str
    transport: str
    topology: str
    rows: list[Row]


def main(
    shapes: Annotated[str, typer.Option(help=f"of {', '.join(SHAPES)}")] = "llama-3-70b,mixtral-8x22b,smollm2-135m",
    orders: Annotated[str, typer.Option(help="contiguous, fragmented, random")] = "contiguous,fragmented,random",
    methods: Annotated[
        str, typer.Option(help=f"of {', '.join((*_METHODS, *_COLLECTIVES))}")
    ] = "auto,read,write,staged,stock,gloo send/recv",
    megabytes: Annotated[int, typer.Option(help="KV bytes of one transfer")] = 1000,
    repeats: Annotated[int, typer.Option(help="timed transfers per case")] = 10,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    devices: Annotated[str, typer.Option(help="of source and destination, as in cuda:0,cuda:1")] = "",
    transport: Annotated[Transport, typer.Option("--nixl-transport")] = Transport.AUTO,
    quick: Annotated[bool, typer.Option("--quick", help="256 MB, two shapes, three repeats")] = False,
    json: Annotated[Path | None, typer.Option("--json", help="file for the raw samples")] = None,
    picture: Annotated[Path | None, typer.Option("--plot", help="PNG or SVG file")] = None,
) -> None:
    """GB/s of KV transfers between two processes on one host, beside a plain copy and stock descriptors.

    Every transfer's bytes are compared by checksum. The ratio is to a plain copy of the same bytes, on a CPU timed in
    turn with the transfers.
    """
    if quick:
        shapes, orders, megabytes, repeats = "llama-3-70b,smollm2-135m", "contiguous,random", 256, 3
    source, _, destination = (devices or f"{device},{device}").partition(",")
    ends = (source.strip(), destination.strip() or source.strip())
    report = Report(machine() | _gpu(ends), "-".join(dict.fromkeys(ends)), transport.value, topology(), [])
    jobs = [(SHAPES[s.strip()], m.strip()) for s in shapes.split(",") for m in [PLAIN, *methods.split(",")]]
    for shape, method in track(jobs, description="transfers"):
        count = max(1, megabytes * 1_000_000 // shape.block_bytes)
        if method == PLAIN:
            report.rows.append(plain_copy(shape, count, ends, repeats))
            continue
        total = -(-2 * count // 8) * 8
        if method in _COLLECTIVES:
            with pair(shape, 8, ends, backends=("local", "tcp")) as case:
                report.rows.append(collective(case, shape, count, repeats, *method.split(" ")))
            continue
        with pair(shape, total, ends, **(_METHODS[method] | {"transport": transport})) as case:
            for order in orders.split(","):
                report.rows.append(measure(case, shape, order.strip(), method, count, repeats, total))
    show(report)
    if json is not None:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    if picture is not None:
        plot(report, picture)
    os._exit(1 if any(row.error for row in report.rows) else 0)


def _gpu(ends: tuple[str, str]) -> dict[str, str]:
    if not ends[0].startswith("cuda"):
        return {}
    import torch

    count = len(set(ends))
    found = {"gpu": f"{count} x {torch.cuda.get_device_name(ends[0])}", "cuda": str(torch.version.cuda)}
    return found | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}


def _speed(row: Row) -> float:
    return row.total_bytes / float(np.median(row.seconds)) / 1e9 if row.seconds else float("nan")


def _plain_speed(row: Row) -> float:
    return row.total_bytes / float(np.median(row.plain_s)) / 1e9 if row.plain_s else 0.0


def show(report: Report) -> None:
    """Columns as nixlbench names them; ratio first."""
    where = report.machine.get("gpu", report.machine["cpu"])
    table = Table(title=f"{report.transport} on {where}")
    columns = ("ratio", "shape", "order", "method", "block B", "batch", "desc.", "GB/s", "avg ms", "P99 ms")
    for column in (*columns, "prep ms", "post ms", "xfer ms", "NVLink MB", "lane"):
        table.add_column(column, justify="right")
    ceiling = {row.shape: _speed(row) for row in report.rows if row.method == PLAIN}
    for row in report.rows:
        if row.error:
            table.add_row("-", row.shape, row.order, row.method, str(row.block_bytes), str(row.blocks), row.error[:60])
            continue
        ms = [1e3 * s for s in row.seconds]
        parts = [f"{1e3 * float(np.mean(x)):.2f}" if x else "-" for x in (row.prep_s, row.post_s, row.wire_s)]
        table.add_row(
            f"{_speed(row) / (_plain_speed(row) or ceiling[row.shape]):.2f}",
            *(row.shape, row.order, row.method, str(row.block_bytes), str(row.blocks), str(row.descriptors)),
            f"{_speed(row):.2f}",
            f"{np.mean(ms):.1f}",
            f"{np.percentile(ms, 99):.1f}",
            *parts,
            "-" if row.nvlink_bytes is None else f"{row.nvlink_bytes / 1e6:.0f}",
            row.lane,
        )
    Console(width=max(180, Console().width)).print(table)


def plot(report: Report, path: Path) -> None:
    """GB/s of every case as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report.rows if not row.error]
    figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(rows) + 1.2), layout="constrained")
    names = [f"{row.shape} {row.order} {row.method}" for row in rows]
    axes.barh(names[::-1], [_speed(row) for row in rows][::-1])
    axes.set(xlabel="GB/s (median)", title=f"{report.transport} on {report.machine.get('gpu', report.machine['cpu'])}")
    axes.tick_params(axis="y", labelsize=7)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
