# SPDX-License-Identifier: Apache-2.0
"""Moving a running request from one worker to another."""
