# SPDX-License-Identifier: Apache-2.0
"""Policies on simulated clusters, and how long a decision takes."""
