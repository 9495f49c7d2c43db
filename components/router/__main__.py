# SPDX-License-Identifier: Apache-2.0
"""Runs one router: ``python -m components.router``."""

from components import process
from components.router.service import serve

if __name__ == "__main__":
    process.run(serve)
