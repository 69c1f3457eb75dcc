"""Which backend's kernel serves an op: fusedres.kernels.<folder>.<backend>.<op>."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch

from fusedres import cuda_support

# Backends to use, in this order, if a backend has no kernel for an op or cannot run here. Every other backend has
# kernels for its ops, or raises.
STAND_INS: dict[str, tuple[str, ...]] = {"cuda": ("triton", "reference")}


def find(folder: str, op: str, backend: str) -> Callable[..., Any] | None:
    """Return a backend's own kernel for an op, None if it has none."""
    try:
        return getattr(import_module(f"fusedres.kernels.{folder}.{backend}"), op, None)
    except ModuleNotFoundError:  # also if Triton is not installed
        return None


@torch.compiler.assume_constant_result
def serving(folder: str, op: str, backend: str) -> str:
    """Return the backend that provides the kernel when `backend` is selected."""
    return explain(folder, op, backend)[0]


@cache
def explain(folder: str, op: str, backend: str) -> tuple[str, str]:
    """Return the backend that provides the kernel when `backend` is selected, and the reason."""
    if backend not in STAND_INS:
        return backend, "it has a kernel of its own"
    reason = cuda_support.unsupported()
    if reason is None:
        if find(folder, op, backend) is not None:
            return backend, "it has a kernel of its own"
        reason = f"there is no {backend} kernel"
    return next((other, reason) for other in STAND_INS[backend] if find(folder, op, other) is not None)
