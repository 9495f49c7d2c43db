# SPDX-License-Identifier: Apache-2.0
"""The protocol of a transfer between two agents: messages, the staged exchange, the worker that steps them."""
