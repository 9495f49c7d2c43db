# SPDX-License-Identifier: Apache-2.0
"""Policies that decide migrations."""
