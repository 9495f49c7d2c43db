# SPDX-License-Identifier: Apache-2.0
"""Inputs of a target. A ``Target`` names its corpus; ``inputs`` is a hypothesis strategy over it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import yaml
from hypothesis import strategies as st

from components.errors import MigrateError

CORPUS = Path(__file__).parent / "corpus"
Value = Any


@cache
def _files(name: str) -> list[bytes]:
    return [b"", *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]


@dataclass(frozen=True)
class Target:
    """``run`` processes one input; ``form`` is the corpus's format for structural changes."""

    name: str
    run: Callable[[bytes], object]
    form: str = "msgpack"

    def corpus(self) -> list[bytes]:
        """All files of the target, and the empty input."""
        return _files(self.name)

    def feed(self, data: bytes) -> bool:
        """True when the input was accepted, False when it was refused correctly."""
        try:
            self.run(data)
        except MigrateError:
            return False
        return True


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.sampled_from([-1, 0, 1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64 - 1, 4 * 2**20]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", "\x00", "../../etc/passwd", "a/b", "*", ">", "é" * 600, "x" * 5000]),
)
_ANY = st.recursive(
    _SCALARS | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def _read(form: str, data: bytes) -> Value:
    return {"msgpack": msgspec.msgpack.decode, "json": json.loads, "yaml": yaml.safe_load}[form](data)


def _write(form: str, value: Value) -> bytes:
    if form == "msgpack":
        return msgspec.msgpack.encode(value)
    if form == "json":
        return json.dumps(value, default=repr).encode()
    return yaml.safe_dump(value).encode()


@st.composite
def _changed(draw: st.DrawFn, value: Value, depth: int = 0) -> Value:
    """The value with one node replaced, doubled or dropped."""
    if not value or not isinstance(value, dict | list) or draw(st.integers(0, 3 + 2 * depth)) == 0:
        return draw(_ANY)
    copied = dict(value) if isinstance(value, dict) else list(value)
    key = draw(st.sampled_from(list(copied) if isinstance(copied, dict) else range(len(copied))))
    match draw(st.integers(0, 5)):
        case 0:
            del copied[key]
        case 1 if isinstance(copied, list):
            copied *= draw(st.integers(2, 40))
        case 1:
            copied[draw(st.text(max_size=8))] = copied[key]
        case _:
            copied[key] = draw(_changed(copied[key], depth + 1))
    return copied


@st.composite
def _bytewise(draw: st.DrawFn, seed: bytes) -> bytes:
    data = bytearray(seed)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.integers(0, 4)):
            case 0 if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if data:
                data[at] = draw(st.integers(0, 255))
            case 2:
                del data[at : at + draw(st.integers(1, 16))]
            case 3:
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case _:
                data[at:at] = data[at : at + draw(st.integers(1, 32))]
    return bytes(data)


@st.composite
def inputs(draw: st.DrawFn, target: Target) -> bytes:
    """One input."""
    seed = draw(st.sampled_from(target.corpus()))
    how = draw(st.sampled_from(["structure", "structure", "bytes", "noise"]))
    if how == "noise":
        return draw(st.binary(max_size=400))
    if how == "structure" and target.form != "bytes" and seed:
        try:
            value = _read(target.form, seed)
        except (ValueError, yaml.YAMLError, msgspec.DecodeError, RecursionError):
            return draw(_bytewise(seed))
        for _ in range(draw(st.integers(1, 3))):
            value = draw(_changed(value))
        try:
            return _write(target.form, value)
        except (TypeError, ValueError, OverflowError, yaml.YAMLError):
            return draw(_bytewise(seed))
    return draw(_bytewise(seed))


def huge() -> dict[str, bytes]:
    """Inputs that are bounded by their kind, not by luck: large, deep, not UTF-8."""
    deep = 100_000
    return {
        "deep msgpack": b"\x91" * deep + b"\xc0",
        "deep json": b"[" * deep + b"]" * deep,
        "deep json objects": b'{"a":' * deep + b"1" + b"}" * deep,
        "deep yaml": b"[" * 3000 + b"]" * 3000,
        "not UTF-8": b"\xff\xfe\x00\x80" * 1000,
        "not UTF-8 in msgpack": b"\x81\xa4name\xa4\xff\xfe\xff\xfe",
        "promises 4 GiB": b"\xc6\xff\xff\xff\xff",
        "promises 4 G entries": b"\xdd\xff\xff\xff\xff",
        "many zeros": b"\x00" * (20 << 20),
        "billion laughs": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
        + b"".join(b"%c: &%c [%s]\n" % (98 + n, 98 + n, b",".join([b"*%c" % (97 + n)] * 9)) for n in range(8)),
    }
