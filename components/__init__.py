# SPDX-License-Identifier: Apache-2.0
"""Worker, router, transfer and launcher components of Dynamo Migrate."""
