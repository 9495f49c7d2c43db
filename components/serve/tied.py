# SPDX-License-Identifier: Apache-2.0
"""Becomes another program, which the kernel ends with its parent: ``tied.py PARENT PROGRAM ARGUMENTS...``.

A script of its own, because it must run between fork and exec: code of the launcher there could meet a lock that one
of its native threads held. The kernel counts the end of the thread that started it as that of the parent: start it
from a thread that lasts. Ends with 1 when the parent has gone already.
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
