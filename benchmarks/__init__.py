# SPDX-License-Identifier: Apache-2.0
"""Benchmarks; each prints its baseline beside its result."""
