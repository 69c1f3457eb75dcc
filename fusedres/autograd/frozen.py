"""Frozen blocks, for fusedres.freeze: BatchNorm is folded into the convolutions once, and the weights laid out once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.folded_block import fold_block, run_folded
from fusedres.autograd.folded_convolution import FoldedConvolution
from fusedres.autograd.inference import in_parts
from fusedres.autograd.layout import in_format
from fusedres.autograd.memory import dense, require_memory
from fusedres.autograd.plan import BlockPlan, Inputs, Tensors


class FrozenBlock(NamedTuple):
    """The folded convolutions of a block, the projection's last, for inputs of one kind."""

    kind: tuple[torch.dtype, torch.device, torch.dtype]
    convolutions: tuple[FoldedConvolution, ...]


class Frozen:
    """What fusedres.freeze leaves on a block: the folded convolutions, made at the first call with each kind of input.

    A block that leaves eval mode drops this object. So what a call in another thread folds meanwhile is dropped too.
    """

    def __init__(self) -> None:
        self._block: FrozenBlock | None = None
        self._parts: dict[int, Frozen] = {}

    def folded(self, inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> FrozenBlock:
        """The folds for inputs like these."""
        block, kind = self._block, (inputs.x.dtype, inputs.x.device, plan.dtype)
        if block is None or block.kind != kind:
            block = self._block = FrozenBlock(kind, fold_block(inputs, plan, tensors))
        return block

    def part(self, index: int) -> Frozen:
        """What is kept of one of the parts that a block with filters runs in."""
        return self._parts.setdefault(index, Frozen())


def run_frozen(inputs: Inputs, plan: BlockPlan, frozen: FrozenBlock) -> Tensor:
    """Return relu(F(x) + S(x)) of the folded block; inputs in any memory format."""
    inputs = dense(inputs)
    require_memory(inputs.x, ())
    y = in_parts(inputs, plan, lambda part, out: run_folded(part, plan, frozen.convolutions, out))
    return in_format(y, plan.channels_last)
