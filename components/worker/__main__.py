# SPDX-License-Identifier: Apache-2.0
"""``python -m components.worker ARGS``: see ``components.worker.dynamo_vllm``.

The engine's process imports this module again, so the shim is installed at import time.
"""

from components.worker import shim

shim.install()

if __name__ == "__main__":
    from components.worker.dynamo_vllm import main

    main()
