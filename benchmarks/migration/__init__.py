# SPDX-License-Identifier: Apache-2.0
"""Downtime and stall of migrations by prompt length and mode: ``python -m benchmarks.migration``."""
