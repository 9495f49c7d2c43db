#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Writes requirements.lock and requirements-gpu.lock from pyproject.toml. Further arguments go to uv:
# --upgrade takes the newest versions that pyproject.toml allows, --upgrade-package NAME only that one's.
set -euo pipefail
cd "$(dirname "$0")/.."
# What pyproject.toml's tool.uv.environments says; uv repeats it on every line.
here="implementation_name == 'cpython' and platform_machine == 'x86_64'"
here="$here and platform_python_implementation == 'CPython' and sys_platform == 'linux'"

compile() {
  local lock=$1
  shift
  .venv/bin/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --group install \
    --extra planner --extra otel "$@" --no-annotate --no-header --output-file "$lock"
  sed -i -e "s/ ; python_full_version < '3.13' and $here\$//" -e "s/ and $here\$//" "$lock"
}

compile requirements-gpu.lock --extra gpu "$@"
compile requirements.lock --extra cpu --extra bench --extra dev --extra docs --overrides scripts/cpu-overrides.txt \
  --no-emit-package torch "$@"
# What PyPI's CUDA build of torch asks for; the CPU build does not.
sed -i -E '/^(nvidia|cuda)-/d' requirements.lock
for lock in requirements.lock requirements-gpu.lock; do
  sed -i "1i # Written by make lock: what was tested, for Linux on x86-64 and Python 3.11 (3.12 resolved, not tested)." "$lock"
done
