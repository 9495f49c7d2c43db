# SPDX-License-Identifier: Apache-2.0
"""Discovery of peers: agent records and the stores they are published in."""
