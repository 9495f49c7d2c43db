# SPDX-License-Identifier: Apache-2.0
"""Dynamo's planner as a component of a graph, with the migration plugin."""
