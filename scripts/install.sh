#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs requirements.lock into .venv, and etcd and NATS from Debian's packages when they are missing.
# PYTHON chooses the interpreter (3.11 or 3.12); TORCH_INDEX_URL an index that has torch's CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/installed-$(cat pyproject.toml requirements.lock scripts/install.sh | sha256sum | cut -c1-16)
[ -e "$stamp" ] || {
  "${PYTHON:-python3}" -m venv .venv
  pip=".venv/bin/python -m pip --quiet --disable-pip-version-check"
  uv=".venv/bin/uv --quiet --no-progress"
  $pip install "$(grep '^uv==' requirements.lock)"
  torch=$(grep '^torch==' scripts/cpu-overrides.txt)
  if ! compgen -G ".venv/lib/python3*/site-packages/torch-${torch#*==}*.dist-info" >/dev/null; then
    # pip's configuration may name a place that has the CPU build, which uv does not read; uv installs it faster.
    rm -rf .venv/torch
    $pip download --no-deps --dest .venv/torch ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch"
    $uv pip install --no-deps .venv/torch/*.whl
    rm -r .venv/torch
  fi
  if ! grep -q '^cuda.*None$' .venv/lib/python3*/site-packages/torch/version.py; then
    echo "error: a CUDA build of torch was installed; set TORCH_INDEX_URL to PyTorch's CPU index and try again" >&2
    exit 2
  fi
  $uv pip install --no-deps --requirements requirements.lock
  $uv pip install --no-deps --no-build-isolation --editable .
  # Side by side, for a quick first start: bytecode of what a graph's processes import (uv writes none), and the
  # demonstration's model. What is wrong with either is told where it is used.
  modules="components.worker.__main__, components.worker.dynamo_vllm, components.cli, components.dashboard.__main__"
  modules="$modules, dynamo.vllm.main, dynamo.frontend.main, vllm.v1.worker.cpu_worker, vllm.model_executor.models.llama"
  env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c "import $modules" >/dev/null 2>&1 &
  .venv/bin/python -c "from components import models; models.resolve('smollm2')" >/dev/null 2>&1 || true
  wait
  touch "$stamp"
}
missing=""
command -v etcd >/dev/null || missing="$missing etcd-server"
command -v nats-server >/dev/null || missing="$missing nats-server"
if [ -n "$missing" ]; then
  if [ "$(id -u)" = 0 ]; then sudo=""; elif sudo -n true 2>/dev/null; then sudo="sudo"; else
    echo "error: please install the packages etcd-server and nats-server (missing:$missing)" >&2
    exit 2
  fi
  $sudo apt-get update -q >/dev/null
  DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -q $missing >/dev/null
fi
