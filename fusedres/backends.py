"""Which kernels serve a device: the user's choice, or the verified default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fusedres import cuda_support, dispatch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

# For each device type with kernels verified on it: the backend that "auto" uses there. Other devices use the backend of
# their table of measured choices. Without a table they run torch's operators unfused, unless fuse() was given conv or
# memory (modules/choice.py).
_VERIFIED = {"cpu": "cpu"}

# Device types that a backend serves; the reference composite serves all. Triton's interpreter accepts CPU tensors. On
# meta tensors Triton's launches are only recorded.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda", "meta", "cpu") if _INTERPRETED else ("cuda", "meta")}


def served_devices(name: str, device_type: str) -> tuple[str, ...]:
    """Return the device types that a backend serves; if it serves all, return device_type alone."""
    return cuda_support.devices if name == "cuda" else _DEVICES.get(name, (device_type,))


def _require(name: str, source: str) -> None:
    """Raise if something that a backend needs is missing."""
    missing = cuda_support.missing() if name == "cuda" else None
    if missing is not None:
        raise RuntimeError(f"{source}: the cuda backend cannot run here: {missing}")


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_initial = _checked(os.environ.get("FUSEDRES_BACKEND", "auto"), "environment FUSEDRES_BACKEND")
_selected: ContextVar[str] = ContextVar("fusedres_backend", default=_initial)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Select the kernels of every fused block called inside the context, and of its backward.

    Args:
        name: ``"auto"`` (the default: the kernels verified for the device or measured on it), ``"reference"``
            (readable PyTorch, any device), ``"cpu"`` (C++, CPU tensors), ``"triton"`` (NVIDIA GPUs; also CPU tensors
            if Python was started with ``TRITON_INTERPRET=1``), or ``"cuda"`` (CUDA C++, NVIDIA GPUs). With ``"cuda"``,
            Triton's kernel runs if an op has no CUDA kernel, the driver is too old, or the build does not target this
            GPU; ``python -m fusedres info`` shows what each op runs. The environment variable ``FUSEDRES_BACKEND``
            sets the default.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: ``"cuda"`` was selected without CUDA kernels in the installation, or without a GPU.
    """
    _require(_checked(name, "use_backend"), "use_backend")
    token = _selected.set(name)
    try:
        yield
    finally:
        _selected.reset(token)


@torch.compiler.assume_constant_result
def _current() -> str:
    """Return the selected name; compiled code keeps the name from its compilation."""
    return _selected.get()


def automatic() -> bool:
    """Whether no backend is selected in this context."""
    return _current() == "auto"


def backend_for(device: torch.device | str) -> str | None:
    """Return the backend that serves a device in this context, or None if nothing was verified or measured for it.

    Raises:
        RuntimeError: the selected backend does not serve this device.
    """
    device_type = device if isinstance(device, str) else device.type
    name = _current()
    if name == "auto":
        return _VERIFIED.get(device_type) or dispatch.backend(torch.device(device))
    if device_type not in served_devices(name, device_type):
        _require(name, "use_backend")
        served = ", ".join(served_devices(name, device_type))
        remedy = "select 'auto' or 'reference'"
        if name == "triton":
            remedy += ", or start Python with TRITON_INTERPRET=1 to interpret the kernels on CPU tensors"
        raise RuntimeError(
            f"use_backend: the {name} backend serves {served} tensors, got a {device_type} tensor; {remedy}"
        )
    return name
