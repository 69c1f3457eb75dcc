"""The last call of a block in each mode: a similar call then needs no new checks and no new plan in Python.

Planning a call takes as long as a tiny convolution. If a call gathers exactly the same objects as the last one, and its
input has the same shape, it uses the same plan again. The tensors of the plan are kept alive for that. An object can
stay the same and still change inside (a parameter's `.data`): the C++ passes check this before they compute anything
(`serves` in csrc/residual_block). If they decline, the call is planned as if nothing were remembered.
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
    """A call: everything it depended on, and its plan."""

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
    """Remember a call that the C++ passes serve."""
    if (
        not plan.in_cpp
        or plan.backend != "cpu"
        or plan.dtype is not x.dtype
        or measured(x.device)
        or not gathered.is_fixed()
    ):
        return
    if not all(tensor is None or tensor.is_leaf for tensor in tensors):  # do not keep a graph alive
        return
    unchecked = plan._replace(checked=False)
    made = Remembered(gathered, x.shape, x.stride(), x.dtype, options, unchecked, tensors, _layouts(tensors))
    others = block.__dict__.get("fused_calls", {}).items()
    # Forget calls with tensors that the block no longer has, so that their memory is freed.
    kept = {mode: call for mode, call in others if all(map(_same_or_unread, call.tensors, tensors))}
    block.__dict__["fused_calls"] = kept | {block.training: made}


def recall(block: nn.Module, gathered: Gathered, x: Tensor, options: tuple[str, str]) -> Remembered | None:
    """Return the last call in the block's mode if this call is like it, else None; x is on the CPU and plain."""
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
    """Whether both are the same tensor, or a mode does not read it and has None (the counter in eval mode)."""
    return old is new or old is None or new is None


def _layouts(tensors: Tensors) -> _Layouts:
    return tuple((weight.shape, weight.stride()) for weight in tensors[::UNIT_TENSORS] if weight is not None)
