# SPDX-License-Identifier: Apache-2.0
"""Runs one prefill worker: ``python -m components.worker.prefill``."""

from components.worker.service import main

if __name__ == "__main__":
    main("prefill")
