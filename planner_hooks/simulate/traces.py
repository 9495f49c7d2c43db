# SPDX-License-Identifier: Apache-2.0
"""Requests to simulate: from published trace files, or made after published statistics.

Formats
    Azure      CSV: TIMESTAMP, ContextTokens, GeneratedTokens (AzurePublicDataset, LLM inference 2023 and 2024)
    BurstGPT   CSV: Timestamp, Model, Request tokens, Response tokens, ...
    Mooncake   JSON lines: {"timestamp": ms, "input_length", "output_length", "hash_ids"}; Dynamo's replay reads it too

Raises ``ConfigError`` for files that are none of these.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from collections.abc import Sequence
from datetime import datetime
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


def swing(times: np.ndarray, duration_s: float) -> np.ndarray:
    """Share of the peak rate at each time: from a quarter to the whole and back, twice."""
    share: np.ndarray = 0.625 - 0.375 * np.cos(4 * np.pi * times / max(duration_s, 1.0))
    return share


def burstgpt(rate: float, duration_s: float, seed: int = 1) -> list[Arrival]:
    """Conversations with the statistics of BurstGPT (Wang et al., arXiv:2401.17644), whose files are in Git LFS.

    Bursts with Gamma gaps; prompts of 621 and answers of 126 tokens on average and of 31,400 and 12,500 at most; 3.9%
    of sessions have several turns. The shape of the Gamma gaps (0.5) and of the log-normal lengths are assumptions.
    """
    rng = np.random.default_rng(seed)
    count = max(1, int(rate * duration_s / _TURNS))
    begins = np.cumsum(rng.gamma(0.5, 2.0 * _TURNS / rate, count))
    found, ids = [], itertools.count(1)
    for begin in begins.tolist():
        prompt, prefix = 0, list[int]()
        for turn in range(1 + int(rng.geometric(0.4) if rng.random() < 0.039 else 0)):
            prompt += int(np.clip(rng.lognormal(5.75, 1.0), 8, 31_400))
            answer = int(np.clip(rng.lognormal(4.1, 1.2), 1, 12_500))
            begin += float(rng.exponential(30.0)) if turn else 0.0
            prefix += [next(ids) for _ in range(prompt // _BLOCK - len(prefix))]
            found.append(Arrival(begin, prompt, answer, prefix=tuple(prefix)))
            prompt += answer
    return sorted((a for a in found if a.time_s < duration_s), key=lambda a: a.time_s)


_TURNS = 1.0 + 0.039 * 2.5
"""Of a session, on average."""
_BLOCK = 512


def replay(trace: Sequence[Arrival], rate: float, duration_s: float, seed: int = 1) -> list[Arrival]:
    """A part of a trace at another rate: several copies from different times on, together, a little slower if need be.

    Each copy has users of its own: of their prompts only the first block, a system prompt's, is common.
    """
    rng = np.random.default_rng(seed)
    span = trace[-1].time_s * len(trace) / max(1, len(trace) - 1)
    copies = math.ceil(rate * span / len(trace))
    slower = copies * len(trace) / span / rate
    times = np.array([arrival.time_s for arrival in trace])
    found = []
    for copy in range(copies):
        at = (times - float(rng.uniform(0, span))) % span * slower
        for number in np.flatnonzero(at < duration_s).tolist():
            old = trace[number]
            prefix = tuple(block if not block else (copy << 40) + block for block in old.prefix)
            found.append(Arrival(float(at[number]), old.prompt_tokens, old.output_tokens, prefix=prefix))
    return sorted(found, key=lambda arrival: arrival.time_s)


def reused(arrivals: Sequence[Arrival]) -> float:
    """Share of all prompt tokens that one cache without a limit would have."""
    seen: set[int] = set()
    hits = total = 0
    for arrival in arrivals:
        known = next((n for n, block in enumerate(arrival.prefix) if block not in seen), len(arrival.prefix))
        hits += min(known * _BLOCK, arrival.prompt_tokens)
        total += arrival.prompt_tokens
        seen.update(arrival.prefix)
    return hits / max(1, total)


def read(path: Path) -> list[Arrival]:
    """A trace file. Times begin at 0."""
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
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (KeyError, ValueError, TypeError, RecursionError, csv.Error) as error:
        raise ConfigError(f"{path} is not a trace this reads: {error!r}") from error
    found = sorted((a for a in found if a.output_tokens > 0 and a.prompt_tokens > 0), key=lambda a: a.time_s)
    if not found:
        raise ConfigError(f"{path} holds no request with both prompt and output tokens")
    begin = found[0].time_s
    return [msgspec.structs.replace(a, time_s=a.time_s - begin) for a in found]


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
    lengths = int(str(row["input_length"])), int(str(row["output_length"]))
    return Arrival(float(str(row["timestamp"])) / 1e3, *lengths, prefix=tuple(int(h) for h in hashes))
