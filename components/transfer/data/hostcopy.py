# SPDX-License-Identifier: Apache-2.0
"""Copies between host addresses on threads of their own, without the interpreter lock.

Numba, a requirement of vLLM, compiles the copy once: it never holds the interpreter lock that an engine's thread in
the same process needs, and it reads and writes memory once. Large copies may bypass the caches: the destination's
memory is then not read first, and the engine's data stays in the caches.
``HostCopier`` may be used from any thread. The caller guarantees the addresses.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np

from components.transfer.layout import Ints

_MAX_THREADS = 8
_STEP_BYTES = 64 << 10
"""Bytes of one call of the C library's copy. Above some megabytes it bypasses the caches, which is a quarter slower."""

_LINE_BYTES = 64
"""Bytes of one write that bypasses the caches; blocks of other sizes go through them."""

_PAGE_BYTES = 4096
_AHEAD_BYTES = 16 << 10
"""Bytes of the next piece of which one line of each page is prefetched. Without that, pieces of 12 KiB in random
order spend a fifth of their time on address translation."""


def threads_for(configured: int) -> int:
    """Number of copying threads: as configured, or one for each core of this process, at most eight."""
    return configured or min(_MAX_THREADS, len(os.sched_getaffinity(0)))


@cache
def copier_is_available() -> tuple[bool, str]:
    """(True, "") or (False, why not)."""
    try:
        _compiled()
    except ImportError as error:
        return False, f"numba cannot be imported: {error}"
    return True, ""


@cache
def _compiled() -> Callable[[Ints, Ints, Ints, bool], None]:
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def copy_bytes(typing: Any, target: Any, source: Any, size: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = ir.IntType(8).as_pointer()
            to, origin = (builder.inttoptr(address, pointer) for address in arguments[:2])
            cgutils.raw_memcpy(builder, to, origin, arguments[2], 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), emit

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def stream_line(typing: Any, target: Any, source: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            pointer = ir.VectorType(ir.IntType(64), _LINE_BYTES // 8).as_pointer()
            to, origin = (builder.inttoptr(address, pointer) for address in arguments)
            store = builder.store(builder.load(origin, align=1), to, align=_LINE_BYTES)
            store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), emit

    @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
    def fence(typing: Any) -> Any:
        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            builder.fence("seq_cst")
            return context.get_dummy_value()

        return types.void(), emit

    def prefetch(for_writing: int) -> Any:
        @intrinsic  # type: ignore[untyped-decorator,unused-ignore]
        def touch(typing: Any, address: Any) -> Any:
            def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
                pointer, number = ir.IntType(8).as_pointer(), ir.IntType(32)
                kind = ir.FunctionType(ir.VoidType(), [pointer, number, number, number])
                function = builder.module.declare_intrinsic("llvm.prefetch", [pointer], kind)
                where = builder.inttoptr(arguments[0], pointer)
                builder.call(function, [where, number(for_writing), number(3), number(1)])
                return context.get_dummy_value()

            return types.void(types.int64), emit

        return touch

    step, page, near, line = _STEP_BYTES, _PAGE_BYTES, _AHEAD_BYTES, _LINE_BYTES
    touch_source, touch_target = prefetch(0), prefetch(1)

    @njit(["void(int64[::1], int64[::1], int64[::1], boolean)"], nogil=True, boundscheck=False)  # type: ignore[untyped-decorator,unused-ignore]
    def copy_all(targets: Ints, sources: Ints, sizes: Ints, around: bool) -> None:
        for n in range(len(sizes)):
            if n + 1 < len(sizes):
                for ahead in range(0, min(sizes[n + 1], near), page):
                    touch_source(sources[n + 1] + ahead)
                    if not around:
                        touch_target(targets[n + 1] + ahead)
            if around and targets[n] % line == 0 and sizes[n] % line == 0:
                for start in range(0, sizes[n], line):
                    stream_line(targets[n] + start, sources[n] + start)
            else:
                for start in range(0, sizes[n], step):
                    copy_bytes(targets[n] + start, sources[n] + start, min(step, sizes[n] - start))
        if around:
            fence()  # Non-temporal stores are weakly ordered: fence before completion is signalled.

    compiled: Callable[[Ints, Ints, Ints, bool], None] = copy_all
    return compiled


class HostCopier:
    """See the module docstring."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._run = _compiled()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kv-copy")

    def submit(self, targets: Ints, sources: Ints, sizes: Ints, around: bool = False) -> Future[None]:
        """Copy ``sizes`` bytes from each of ``sources`` to each of ``targets``; ``around`` bypasses the caches."""
        to, origin, length = (np.ascontiguousarray(column, np.int64) for column in (targets, sources, sizes))
        return self._pool.submit(self._run, to, origin, length, around)

    def close(self) -> None:
        """End the threads after all submitted copies."""
        self._pool.shutdown(wait=True)
