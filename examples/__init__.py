# SPDX-License-Identifier: Apache-2.0
"""Small programs over the package; each is run by a test."""
