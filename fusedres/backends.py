"""Which kernels serve a device: chosen by the user, or the verified default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from fusedres import cuda_support, dispatch

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

# Devices whose kernels have been verified on that kind of device: what "auto" takes there. A device that is not listed
# takes the backend of its table of measured choices; without one it runs the unfused composition of torch's operators,
# unless fuse() was told conv or memory (modules/choice.py).
_VERIFIED = {"cpu": "cpu"}

# Device types that a backend serves; the reference composite serves all. Triton's interpreter takes CPU tensors; on
# meta tensors its launches are only recorded.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = {"cpu": ("cpu",), "triton": ("cuda", "meta", "cpu") if _INTERPRETED else ("cuda", "meta")}


def served_devices(name: str, device_type: str) -> tuple[str, ...]:
    """The device types that a backend serves; this one too where it serves all."""
    return cuda_support.devices if name == "cuda" else _DEVICES.get(name, (device_type,))


def _require(name: str, source: str) -> None:
    """Raises where what a backend needs is not there."""
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
    """Selects the kernels of every fused block called inside the context, and of its backward.

    Args:
        name: ``"auto"`` (the kernels verified for the device or measured on it; the default), ``"reference"``
            (readable PyTorch, any device), ``"cpu"`` (C++, CPU tensors), ``"triton"`` (NVIDIA GPUs; CPU tensors where
            Python was started with ``TRITON_INTERPRET=1``), or ``"cuda"`` (CUDA C++, NVIDIA GPUs; Triton's kernel
            where an op has no other, where the driver is too old, or where the GPU is none that was built for:
            ``python -m fusedres info`` shows which op runs what). The environment variable ``FUSEDRES_BACKEND`` sets
            the default.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: ``"cuda"`` in an installation without CUDA kernels, or without a GPU.
    """
    _require(_checked(name, "use_backend"), "use_backend")
    token = _selected.set(name)
    try:
        yield
    finally:
        _selected.reset(token)


@torch.compiler.assume_constant_result
def _current() -> str:
    """The selected name; what is compiled keeps the one it was compiled under."""
    return _selected.get()


def automatic() -> bool:
    """Whether no backend is selected in this context."""
    return _current() == "auto"


def backend_for(device: torch.device | str) -> str | None:
    """The backend that serves a device in this context, or None where nothing is verified for it.

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
