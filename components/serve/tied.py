# SPDX-License-Identifier: Apache-2.0
"""Executes another program, which the kernel ends with its parent: ``tied.py PARENT PROGRAM ARGUMENTS...``.

A separate script, because this must happen between fork and exec, where code of the launcher could meet a lock of one
of its native threads. For the kernel the parent ends with the thread that started this: start it from a thread that
lasts. Exits with 1 when the parent has gone.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """See the module docstring."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
