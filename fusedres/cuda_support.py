"""fusedres._CUDA, the CUDA kernels: whether this build has them, and whether they can run here.

This module imports no other module of the package.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

# The kernels accept tensors of these devices; on meta tensors nothing is launched. Tests without a GPU replace the
# module by the same kernels compiled for the host, and add "cpu" (tests/cuda_on_cpu.py).
devices: tuple[str, ...] = ("cuda", "meta")
_module: Any = None
_looked = False


def module() -> Any:
    """Return the extension module, or None in a build without it."""
    global _module, _looked
    if not _looked:
        try:
            _module = import_module("fusedres._CUDA")
        except ModuleNotFoundError:
            _module = None
        _looked = True
    return _module


def substitute(replacement: Any, served: tuple[str, ...]) -> None:
    """Replace the extension by another module with the same functions, for tensors of these devices."""
    global _module, _looked, devices
    _module, _looked, devices = replacement, True, served


def missing() -> str | None:
    """Return what is missing for the cuda backend to be selected, with the remedy, or None."""
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
    """Return why the kernels cannot run here, or None if they can; if there is a GPU, other backends run instead."""
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

    Machine code runs on devices with the same major version and at least its minor version. With an "a" it runs on
    exactly its version. PTX runs on its version and all later ones.
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
    """Return CUDA's version number as text: 13000 is "13.0"."""
    return f"{number // 1000}.{number % 1000 // 10}"
