# SPDX-License-Identifier: Apache-2.0
"""Lanes: one interface, one file for each way of moving bytes."""
