"""The ops of one backend for callers that have checked their arguments.

`launches(backend).bn_relu(x, state, pivot, stride)` takes the parameters of fusedres.ops.bn_relu without the backend
and runs the kernel itself, without the dispatcher and the checks. Where torch.compile or a dispatch mode has to see the
op, it goes through the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch

import fusedres.ops  # noqa: F401 - defines them all
from fusedres.ops._library import OPS


class Launches:
    """One callable an op, by the op's name."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        op = OPS.get(name)
        if op is None:
            raise AttributeError(name)
        found = self._of(op)
        setattr(self, name, found)  # looked up once
        return found

    def _of(self, op: Any) -> Any:
        return op.kernel(self._backend)


class Dispatched(Launches):
    """The same through torch's dispatcher."""

    def _of(self, op: Any) -> Any:
        return op.dispatched(self._backend)


_direct: dict[str, Launches] = {}


def direct() -> bool:
    """Whether kernels may run past the dispatcher: neither torch.compile nor a dispatch mode has to see the ops."""
    return not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def launches(backend: str) -> Launches:
    """The launches of a backend, as they may run now."""
    if not direct():
        return Dispatched(backend)
    found = _direct.get(backend)
    if found is None:
        found = _direct[backend] = Launches(backend)
    return found
