# SPDX-License-Identifier: Apache-2.0
"""``dtype: auto`` on processors without fast bfloat16.

Most models are bfloat16. oneDNN, which multiplies matrices for PyTorch on x86, supports it from AVX-512 (BW, VL, DQ)
on (https://uxlfoundation.github.io/oneDNN/dev_guide_data_types.html). Without it PyTorch uses a plain loop: a layer of
SmolLM2 over 512 tokens takes 84 ms on a processor with AVX2, and 12 ms in float32. float32 then is the better choice,
at twice the memory.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from components.config import ComponentConfig, WorkerConfig

_FAST = frozenset({"avx512bw", "avx512vl", "avx512dq"})


@cache
def fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """False on an x86 processor without these instructions; true elsewhere and when unknown."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return True
    flags = next((set(line.partition(":")[2].split()) for line in text.splitlines() if line.startswith("flags")), None)
    return flags is None or flags >= _FAST


def on_cpu(dtype: str) -> str:
    """The dtype that ``dtype`` means on this host without a GPU."""
    return "float32" if dtype == "auto" and not fast_bfloat16() else dtype


def resolve(config: ComponentConfig) -> ComponentConfig:
    """The configuration, after ``on_cpu`` for vLLM workers without GPU."""
    if isinstance(config, WorkerConfig) and not config.devices and config.engine == "vllm":
        return config.model_copy(update={"dtype": on_cpu(config.dtype)})
    return config
