"""The ops of one backend for callers that have checked their arguments.

`launches(backend).bn_relu(x, state, pivot, stride)` takes the parameters of fusedres.ops.bn_relu without the backend,
all of them given, and runs the kernel itself, without the dispatcher and the checks. Where torch.compile, a dispatch
mode or a profiler has to see the op, it goes through the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled
from torch.autograd.graph import _CloneArgBeforeMutateMode

import fusedres.ops  # noqa: F401 - defines them all
from fusedres.ops._library import OPS, Op


class Launches:
    """One function for each op, by the op's name."""

    def __init__(self, function_of: Callable[[Op], Callable[..., Any]]) -> None:
        self._function_of = function_of

    def __getattr__(self, name: str) -> Any:
        if name not in OPS:
            raise AttributeError(name)
        found = self._function_of(OPS[name])
        setattr(self, name, found)  # looked up once
        return found


@cache
def _direct(backend: str) -> Launches:
    return Launches(lambda op: op.kernel(backend))


def direct() -> bool:
    """Whether kernels may run without the dispatcher: nothing has to see the ops: compiler, mode or profiler."""
    if torch.compiler.is_compiling() or _profiler_enabled():
        return False
    modes = torch._C._len_torch_dispatch_stack()
    return modes == 0 or all(map(_sees_no_op_of_ours, range(modes)))


def _sees_no_op_of_ours(index: int) -> bool:
    """Whether a dispatch mode has nothing to do with ops of this package.

    allow_mutation_on_saved_tensors clones saved tensors before an op changes them. What these ops change is saved for
    no backward but their own; and the mode fails where an op may change a tensor that is None.
    """
    return type(torch._C._get_dispatch_stack_at(index)) is _CloneArgBeforeMutateMode


def launches(backend: str) -> Launches:
    """The launches of a backend, as they may run now."""
    return _direct(backend) if direct() else Launches(lambda op: op.dispatched(backend))
