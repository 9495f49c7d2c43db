# SPDX-License-Identifier: Apache-2.0
"""How two agents agree on a transfer: messages, the staged exchange, the worker that steps them."""
