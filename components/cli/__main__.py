# SPDX-License-Identifier: Apache-2.0
"""``python -m components.cli`` is ``dynamo``."""

from components.cli import main

if __name__ == "__main__":
    main()
