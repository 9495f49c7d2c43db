# SPDX-License-Identifier: Apache-2.0
"""CUDA calls of a thread beside an engine that captures its graphs.

While any thread captures in the mode ``global``, which is torch's default, CUDA refuses what it calls unsafe to all
other threads (mapping a peer's memory, loading a kernel, asking an event), and the refused call spoils the capture. A
peer that appears while this engine starts would then cost both. A thread that says so is left alone, which is right for
one that touches no captured stream.
"""

from __future__ import annotations

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)
_RELAXED = 2


def stand_aside() -> None:
    """Take the calling thread out of other threads' captures. Nothing happens where CUDA is not in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        code = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_RELAXED)))
    except (OSError, AttributeError) as error:
        logger.warning("the CUDA driver offers no capture modes: %s", error)
        return
    if code:
        logger.warning("the CUDA driver refused another capture mode: error %d", code)
