# SPDX-License-Identifier: Apache-2.0
"""Lets a thread make CUDA calls while the engine captures its graphs.

While any thread captures in mode ``global`` (torch's default), CUDA refuses unsafe calls of all other threads (mapping
a peer's memory, loading a kernel, querying an event), and a refused call also invalidates the capture. So a peer that
appears during an engine's start would break both. A thread can opt out of this check; that is safe for a thread that
touches no captured stream.
"""

from __future__ import annotations

import ctypes
import logging

import torch

logger = logging.getLogger(__name__)
_RELAXED = 2


def stand_aside() -> None:
    """Opt the calling thread out of other threads' captures. Does nothing where CUDA is not in use."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return
    try:
        code = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(ctypes.c_int(_RELAXED)))
    except (OSError, AttributeError) as error:
        logger.warning("the CUDA driver offers no capture modes: %s", error)
        return
    if code:
        logger.warning("the CUDA driver refused another capture mode: error %d", code)
