# SPDX-License-Identifier: Apache-2.0
"""How bytes move: one interface, one file for each way."""
