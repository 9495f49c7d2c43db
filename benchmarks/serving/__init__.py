# SPDX-License-Identifier: Apache-2.0
"""Serving under load, with and without this package: ``python -m benchmarks.serving``."""
