"""The ops of one backend for callers that have checked their arguments.

`launches(backend).bn_relu(x, state, pivot, stride)` takes the arguments of torch.ops.fusedres.bn_relu without the
backend and runs the kernel itself, past the dispatcher and the checks; where torch.compile or a dispatch mode has to
see the op, it goes through the dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch

from fusedres.ops._library import Op
from fusedres.ops.bn_add_relu import BN_ADD_RELU, BN_ADD_RELU_, BN_ADD_RELU_OUT
from fusedres.ops.bn_add_relu_backward import BN_ADD_RELU_BACKWARD, BN_ADD_RELU_BACKWARD_, BN_RELU_BACKWARD_
from fusedres.ops.bn_frozen import BN_FROZEN
from fusedres.ops.bn_relu import BN_RELU, BN_RELU_
from fusedres.ops.bn_statistics import BN_STATISTICS
from fusedres.ops.conv_dgrad import CONV_DGRAD
from fusedres.ops.conv_fprop import CONV_BN_ADD_RELU, CONV_FPROP
from fusedres.ops.conv_wgrad import CONV_WGRAD, CONV_WGRAD_FINALIZE
from fusedres.ops.empty_batch import EMPTY_BATCH
from fusedres.ops.gram import GRAM
from fusedres.ops.one_pass import ONE_PASS_BACKWARD, ONE_PASS_STATISTICS
from fusedres.ops.relu_backward import RELU_BACKWARD
from fusedres.ops.shortcut_grad import SHORTCUT_GRAD_


class Launches:
    """One callable an op, by the op's name."""

    def __init__(self, backend: str, dispatched: bool) -> None:
        def of(op: Op) -> Any:
            return op.dispatched(backend) if dispatched else op.kernel(backend)

        self.bn_add_relu = of(BN_ADD_RELU)
        self.bn_add_relu_ = of(BN_ADD_RELU_)
        self.bn_add_relu_out = of(BN_ADD_RELU_OUT)
        self.bn_add_relu_backward = of(BN_ADD_RELU_BACKWARD)
        self.bn_add_relu_backward_ = of(BN_ADD_RELU_BACKWARD_)
        self.bn_frozen = of(BN_FROZEN)
        self.bn_relu = of(BN_RELU)
        self.bn_relu_ = of(BN_RELU_)
        self.bn_relu_backward_ = of(BN_RELU_BACKWARD_)
        self.bn_statistics = of(BN_STATISTICS)
        self.conv_bn_add_relu = of(CONV_BN_ADD_RELU)
        self.conv_dgrad = of(CONV_DGRAD)
        self.conv_fprop = of(CONV_FPROP)
        self.conv_wgrad = of(CONV_WGRAD)
        self.conv_wgrad_finalize = of(CONV_WGRAD_FINALIZE)
        self.empty_batch = of(EMPTY_BATCH)
        self.gram = of(GRAM)
        self.one_pass_backward = of(ONE_PASS_BACKWARD)
        self.one_pass_statistics = of(ONE_PASS_STATISTICS)
        self.relu_backward = of(RELU_BACKWARD)
        self.shortcut_grad_ = of(SHORTCUT_GRAD_)


_direct: dict[str, Launches] = {}


def launches(backend: str) -> Launches:
    """The launches of a backend, as they may run now."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return Launches(backend, dispatched=True)
    found = _direct.get(backend)
    if found is None:
        found = _direct[backend] = Launches(backend, dispatched=False)
    return found
