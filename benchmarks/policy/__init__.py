# SPDX-License-Identifier: Apache-2.0
"""Policies on simulated clusters, and the time of a decision."""
