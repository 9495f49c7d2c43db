# SPDX-License-Identifier: Apache-2.0
"""Requests to simulate: synthetic, or from published trace files.

Formats
    Azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens (AzurePublicDataset, LLM inference 2023 and 2024)
    BurstGPT   CSV: Timestamp, Model, Request tokens, Response tokens, ...
    Mooncake   JSON lines: {"timestamp": ms, "input_length", "output_length", "hash_ids"}; Dynamo's replay reads it too

Raises ``ConfigError`` for files that are none of these.
"""

from __future__ import annotations

import csv
import json
from datetime import datetime
from enum import StrEnum
from pathlib import Path

import msgspec
import numpy as np

from components.errors import ConfigError


class Arrival(msgspec.Struct, frozen=True):
    """One request of a client."""

    time_s: float
    prompt_tokens: int
    output_tokens: int
    priority: int = 0
    prefix: tuple[int, ...] = ()
    """Hash ids of the prompt's leading blocks."""
    session: int = 0


class Shape(StrEnum):
    """Distribution of synthetic load."""

    EVEN = "even"
    """Equal lengths, smooth arrivals."""
    HEAVY = "heavy"
    """Log-normal prompts and Pareto outputs, Poisson arrivals."""
    STICKY = "sticky"
    """Like ``HEAVY``; sessions stay with their worker, and some send far more than others."""
    WAVE = "wave"
    """Like ``HEAVY``; the rate swings between a quarter and the whole."""


def synthetic(
    shape: Shape, rate: float, duration_s: float, seed: int = 0, important: float = 0.02, sessions: int = 512
) -> list[Arrival]:
    """Requests at ``rate`` per second (peak rate for ``WAVE``).

    Popularity of sessions is Zipf's with a flat top: one session is a small part of a large cluster's load.
    """
    rng = np.random.default_rng(seed)
    count = max(1, int(rate * duration_s))
    if shape is Shape.EVEN:
        times = np.arange(count) / rate
        return [Arrival(float(t), 512, 256) for t in times]
    times = np.cumsum(rng.exponential(1.0 / rate, count))
    if shape is Shape.WAVE:
        share = 0.625 - 0.375 * np.cos(2 * np.pi * times / max(duration_s, 1.0) * 2)
        times = times[rng.random(count) < share]
    count = len(times)
    prompts = np.clip(rng.lognormal(6.2, 1.0, count), 16, 16_000).astype(int)
    outputs = np.clip((rng.pareto(1.6, count) + 1) * 110, 8, 6000).astype(int)
    priorities = (rng.random(count) < important).astype(int)
    weights = 1.0 / (np.arange(sessions) + 1.0 + sessions / 128) ** 0.8
    chosen = rng.choice(sessions, count, p=weights / weights.sum())
    columns = (times, prompts, outputs, priorities, chosen)
    return [
        Arrival(float(t), int(p), int(o), int(c), prefix=(int(s),) if p >= 512 else (), session=int(s))
        for t, p, o, c, s in zip(*columns, strict=True)
    ]


def read(path: Path, speedup: float = 1.0) -> list[Arrival]:
    """A trace file; ``speedup`` divides all times."""
    try:
        with path.open(newline="") as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                found = [_mooncake(json.loads(line)) for line in file if line.strip()]
            else:
                rows = csv.DictReader(file)
                columns = {name.strip() for name in rows.fieldnames or ()}
                if {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} <= columns:
                    found = [_azure(row) for row in rows]
                elif {"Timestamp", "Request tokens", "Response tokens"} <= columns:
                    found = [_burstgpt(row) for row in rows]
                else:
                    raise ConfigError(f"{path} has columns {sorted(columns)}: not an Azure or BurstGPT trace")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no trace file {path}") from error
    except (KeyError, ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path} is not a trace this reads: {error!r}") from error
    found = sorted((a for a in found if a.output_tokens > 0 and a.prompt_tokens > 0), key=lambda a: a.time_s)
    if not found:
        raise ConfigError(f"{path} holds no request with both prompt and output tokens")
    begin = found[0].time_s
    return [msgspec.structs.replace(a, time_s=(a.time_s - begin) / speedup) for a in found]


def _azure(row: dict[str, str]) -> Arrival:
    # The file has seven digits of a second; Python reads six.
    stamp = (row["TIMESTAMP"] or "").strip()
    whole, _, fraction = stamp.partition(".")
    zone = fraction[len(fraction.rstrip("+-:0123456789")) :] if fraction else ""
    digits = fraction[: len(fraction) - len(zone)] if zone else fraction
    seconds = datetime.fromisoformat(whole).timestamp() + float(f"0.{digits[:9].split('+')[0] or 0}")
    return Arrival(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burstgpt(row: dict[str, str]) -> Arrival:
    return Arrival(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))


def _mooncake(row: dict[str, object]) -> Arrival:
    hashes = row.get("hash_ids") or ()
    if not isinstance(hashes, list | tuple):
        raise TypeError("hash_ids is no list")
    prefix = tuple(int(h) for h in hashes)
    return Arrival(
        float(str(row["timestamp"])) / 1e3,
        int(str(row["input_length"])),
        int(str(row["output_length"])),
        prefix=prefix,
        session=prefix[0] if prefix else 0,
    )
