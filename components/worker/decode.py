# SPDX-License-Identifier: Apache-2.0
"""Runs one decode worker: ``python -m components.worker.decode``."""

from components.worker.service import main

if __name__ == "__main__":
    main("backend")
