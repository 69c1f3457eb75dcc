"""The last call of a block in each mode, so that one like it need not be checked and planned anew in Python.

Planning a call takes as long as a tiny convolution. A call that gathers the very objects of the last one, with an input
of the same shape, takes that one's plan again (its tensors live that long). What may change in an object that stays (a
parameter's `.data`) is checked by the C++ passes before they compute anything (`serves` in csrc/residual_block); where
they decline, the call is planned as if nothing were remembered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedres.autograd import UNIT_TENSORS, BlockPlan, are_plain
from fusedres.dispatch import measured
from fusedres.modules.anatomy import Gathered
from fusedres.modules.reading import Tensors
from fusedres.ops.launch import direct

_Layouts = tuple[tuple[torch.Size, tuple[int, ...]], ...]


class Remembered(NamedTuple):
    """A call: what it depended on, and its plan."""

    gathered: Gathered
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    options: tuple[str, str]  # memory and conv
    plan: BlockPlan
    tensors: Tensors
    layouts: _Layouts  # of the convolutions' weights


def remember(
    block: nn.Module, gathered: Gathered, x: Tensor, options: tuple[str, str], plan: BlockPlan, tensors: Tensors
) -> None:
    """Keeps a call that the C++ passes serve."""
    if plan.backend != "cpu" or plan.dtype is not x.dtype or measured(x.device) or not gathered.is_fixed():
        return
    if not all(tensor is None or tensor.is_leaf for tensor in tensors):  # a graph is not to be kept alive
        return
    unchecked = plan._replace(checked=False)
    made = Remembered(gathered, x.shape, x.stride(), x.dtype, options, unchecked, tensors, _layouts(tensors))
    others = block.__dict__.get("fused_calls", {}).items()
    # A call with tensors that the block no longer has is forgotten, so that their memory is free.
    kept = {mode: call for mode, call in others if all(map(_same_or_unread, call.tensors, tensors))}
    block.__dict__["fused_calls"] = kept | {block.training: made}


def recall(block: nn.Module, gathered: Gathered, x: Tensor, options: tuple[str, str]) -> Remembered | None:
    """The last call in the block's mode, where this one is like it; x is on the CPU and plain."""
    calls: dict[bool, Remembered] | None = block.__dict__.get("fused_calls")
    last = None if calls is None else calls.get(block.training)
    if (
        last is None
        or x.shape != last.shape
        or x.dtype is not last.dtype
        or options != last.options
        or x.stride() != last.strides
        or torch.is_autocast_enabled("cpu")
        or not direct()
        or measured(x.device)
        or not gathered.is_same(last.gathered)
        or not are_plain(*last.tensors)
        or _layouts(last.tensors) != last.layouts
    ):
        return None
    return last


def _same_or_unread(old: Tensor | None, new: Tensor | None) -> bool:
    """A mode that does not read a tensor (the counter in eval mode) has None for it."""
    return old is new or old is None or new is None


def _layouts(tensors: Tensors) -> _Layouts:
    return tuple((weight.shape, weight.stride()) for weight in tensors[::UNIT_TENSORS] if weight is not None)
