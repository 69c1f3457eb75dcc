"""Frozen blocks, for fusedres.freeze: BatchNorm is folded into the convolutions once, and the weights laid out once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fusedres.autograd.folded_convolution import FoldedConvolution, LibraryConvolution, add_shortcut, fold
from fusedres.autograd.forward import unit_state
from fusedres.autograd.inference import in_parts
from fusedres.autograd.layout import in_format
from fusedres.autograd.memory import dense, require_memory
from fusedres.autograd.plan import UNIT_TENSORS, BlockPlan, Inputs, Tensors
from fusedres.ops.launch import launches
from fusedres.values import ShortcutInput, in_dtype


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
            block = self._block = FrozenBlock(kind, _folded(inputs, plan, tensors))
        return block

    def part(self, index: int) -> Frozen:
        """What is kept of one of the parts that a block with filters runs in."""
        return self._parts.setdefault(index, Frozen())


def _folded(inputs: Inputs, plan: BlockPlan, tensors: Tensors) -> tuple[FoldedConvolution, ...]:
    """Fold every unit of a block with constant statistics."""
    found: list[FoldedConvolution] = []
    launch = launches(plan.backend)
    images = min(plan.infer_images, inputs.x.shape[0])
    example = inputs.x[:0].to(plan.dtype)
    shape = (images, *inputs.x.shape[1:])  # of the unit's input
    for index, unit in enumerate(plan.all_units):
        if index == len(plan.units):
            shape = (images, *inputs.shortcut.shape[1:])  # the projection's
        weight = tensors[UNIT_TENSORS * index]
        assert weight is not None
        state = unit_state(example, unit, tensors, index, launch)
        found.append(fold(weight, state, unit, shape, plan.dtype, plan.backend))
        shape = unit.output_shape(shape, weight.shape)
    return tuple(found)


def run_frozen(inputs: Inputs, plan: BlockPlan, frozen: FrozenBlock) -> Tensor:
    """Return relu(F(x) + S(x)) of the folded block; inputs in any memory format."""
    inputs = dense(inputs)
    require_memory(inputs.x, ())
    y = in_parts(inputs, plan, lambda part, out: run_folded(part, plan, frozen.convolutions, out))
    return in_format(y, plan.channels_last)


def run_folded(
    inputs: Inputs,
    plan: BlockPlan,
    convolutions: tuple[FoldedConvolution, ...],
    out: Tensor | None,
    owned: bool = False,
) -> Tensor:
    """Run a folded block on some images.

    Args:
        out: where the result goes, or None.
        owned: nobody else reads the inputs, and the result may be in their memory.
    """
    h, entry = in_dtype(inputs.x, plan.dtype), in_dtype(inputs.shortcut, plan.dtype)
    *inner, last = convolutions[: len(plan.units)]
    for convolution in inner:
        h = convolution(h)
    if plan.reads == "none":
        return last(h, None, True, out)
    if plan.projection is not None:
        entry, owned = convolutions[-1](entry, None, False), True
    if plan.projection is not None or (plan.pad_stride == 1 and entry.shape[1] == last.identity.shape[1]):
        if owned and out is None and isinstance(last, LibraryConvolution):
            return last.onto(h, entry)
        return last(h, entry, True, out)
    y = last(h, None, False)
    return add_shortcut(y, last.identity, ShortcutInput(entry, None, plan.pad_stride), plan.backend, out)
