# SPDX-License-Identifier: Apache-2.0
"""Moves a running request from one worker to another."""
