# SPDX-License-Identifier: Apache-2.0
"""Worker, migration, transfer and launcher components of Dynamo Migrate."""
