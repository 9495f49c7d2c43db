# SPDX-License-Identifier: Apache-2.0
"""Runs one agg worker: ``python -m components.worker.agg``."""

from components.worker.service import main

if __name__ == "__main__":
    main("backend")
