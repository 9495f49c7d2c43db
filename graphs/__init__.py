# SPDX-License-Identifier: Apache-2.0
"""Graphs for ``dynamo serve``."""
