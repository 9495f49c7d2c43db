# SPDX-License-Identifier: Apache-2.0
"""vLLM's own benchmark client in a process of its own: one JSON list of its arguments per line in, one word out.

Importing vLLM takes longer than many a run; this way it is imported once for all runs of a benchmark.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What the client prints must not mix with the answers.
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        try:
            asyncio.run(main_async(parser.parse_args(json.loads(line))))
            answers.write("done\n")
        except Exception as error:
            answers.write(f"failed {error!r}\n")
        answers.flush()


if __name__ == "__main__":
    main()
