# SPDX-License-Identifier: Apache-2.0
"""Inference engines behind one small protocol."""
