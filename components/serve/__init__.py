# SPDX-License-Identifier: Apache-2.0
"""``dynamo serve``: graphs of components, their configuration and the processes that run them."""
