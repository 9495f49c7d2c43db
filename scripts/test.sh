#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Tests in two processes. Without arguments all but the slow ones: those of tests/unit beside the others, with the
# processor time that these leave, because graphs wait much for their processes, and engines for each other.
# usage: scripts/test.sh [unit]   (unit: two halves of tests/unit alone)
set -uo pipefail
cd "$(dirname "$0")/.."
less=10 beside=(tests/unit) here=(--ignore=tests/unit)
[ "${1:-}" != unit ] || less=0 beside=(tests/unit/planner_hooks tests/unit/test_[a-n]*.py) here=(tests/unit/test_[o-z]*.py)
output=$(mktemp)
trap 'kill "$other" 2>/dev/null; rm -f "$output"' EXIT
nice -n $less .venv/bin/python -m pytest -q -p no:cacheprovider "${beside[@]}" >"$output" 2>&1 &
other=$!
.venv/bin/python -m pytest -q "${here[@]}"
first=$?
wait "$other"
second=$?
echo "--- ${beside[0]}:"
# All of a failure, the last lines of a success.
if [ $second = 0 ]; then tail -n 1 "$output"; else cat "$output"; fi
exit $((first ? first : second))
