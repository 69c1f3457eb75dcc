"""fusedres._CUDA, the CUDA kernels: whether this build has them, and whether they can run here. Imports no layer."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

# Devices whose tensors the kernels take; on meta tensors nothing is launched. Tests without a GPU put the kernels as
# compiled for the host in the module's place, and add "cpu" (tests/cuda_on_cpu.py).
devices: tuple[str, ...] = ("cuda", "meta")
_module: Any = None
_looked = False


def module() -> Any:
    """The extension module, None in a build without it."""
    global _module, _looked
    if not _looked:
        try:
            _module = import_module("fusedres._CUDA")
        except ModuleNotFoundError:
            _module = None
        _looked = True
    return _module


def substitute(replacement: Any, served: tuple[str, ...]) -> None:
    """Puts another module of the same functions in the extension's place, for tensors of these devices."""
    global _module, _looked, devices
    _module, _looked, devices = replacement, True, served


def missing() -> str | None:
    """What has to be there before the cuda backend can be selected and is not, with the remedy."""
    if module() is None:
        return (
            "this installation has no CUDA kernels, as nvcc was not found when it was built; install the CUDA toolkit, "
            "set CUDA_HOME to its folder, and run FUSEDRES_BUILD_CUDA=1 pip install . again"
        )
    if "cpu" not in devices and not torch.cuda.is_available():
        return (
            "torch sees no GPU; an NVIDIA GPU, its driver (nvidia-smi lists both) and a CUDA build of torch are needed"
        )
    return None


def unsupported() -> str | None:
    """Why the kernels cannot run here although they are built and there is a GPU: other backends then stand in."""
    reason = missing()
    if reason is not None or "cpu" in devices:
        return reason
    runtime, driver = module().build_info()["runtime"], module().driver_version()
    if driver // 1000 < runtime // 1000:
        served, built = version(driver), version(runtime)
        return f"the driver serves CUDA {served}, the kernels were built with {built}; update the driver"
    archs = module().build_info()["archs"]
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not covers(archs, capability):
            name = ".".join(map(str, capability))
            return (
                f"cuda:{index} has compute capability {name}, the kernels were built for {archs}; "
                f"build them with TORCH_CUDA_ARCH_LIST={name}"
            )
    return None


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures runs on a device.

    Machine code runs on its own major version, from its minor version on; with an "a" on exactly its version; PTX on
    everything from its version on.
    """
    for entry in archs.split(";"):
        number, _, ptx = entry.partition("+")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        built = (major, minor)
        if number.endswith("a"):
            if capability == built:
                return True
        elif (major == capability[0] and built <= capability) or (ptx and built <= capability):
            return True
    return False


def version(number: int) -> str:
    """13000 as 13.0."""
    return f"{number // 1000}.{number % 1000 // 10}"
