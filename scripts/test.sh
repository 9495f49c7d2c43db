#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# All tests but the slow ones. Those of tests/unit run beside the others, with the processor time that these leave:
# graphs wait much for their processes, and engines for each other.
set -uo pipefail
cd "$(dirname "$0")/.."
units=$(mktemp)
trap 'kill "$beside" 2>/dev/null; rm -f "$units"' EXIT
nice -n 10 .venv/bin/python -m pytest -q -p no:cacheprovider tests/unit >"$units" 2>&1 &
beside=$!
.venv/bin/python -m pytest -q --ignore=tests/unit "$@"
others=$?
wait "$beside"
unit=$?
echo "--- tests/unit:"
# All of a failure, the last lines of a success.
if [ $unit = 0 ]; then tail -n 1 "$units"; else cat "$units"; fi
exit $((unit ? unit : others))
