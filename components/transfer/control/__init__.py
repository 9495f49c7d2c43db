# SPDX-License-Identifier: Apache-2.0
"""Who may talk: agent records and the stores they are published in."""
