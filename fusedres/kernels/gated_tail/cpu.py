"""The gated residual tail in C++ (csrc/gated_tail)."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import DTYPE_CODE, address
from fusedres.kernels.cpu_core import empty_like
from fusedres.values import (
    ACTIVATIONS,
    TAIL_SUMS,
    Activation,
    Gated,
    TailCoefficients,
    TailNeeds,
    TailTerm,
    arithmetic_dtype,
    mask_shape,
    tail_groups,
)

_KIND_CODE = {kind: code for code, kind in enumerate(ACTIVATIONS)}  # those of csrc/common/activation.h

_Term = tuple[int, int, int, bool, int, int, bool, int, int]
_NO_TERM: _Term = (0, 0, 0, False, 0, 0, False, 0, 0)


def _term(
    term: TailTerm | None,
    coefficients: Tensor | None = None,
    grad_x: Tensor | None = None,
    grad_logits: Tensor | None = None,
) -> _Term:
    if term is None:
        return _NO_TERM
    per_sample = term.factor is not None and term.factor.shape[0] > 1
    return (
        term.x.data_ptr(),
        address(term.state),
        address(term.factor),
        per_sample,
        address(term.logits),
        address(coefficients),
        coefficients is not None and coefficients.shape[0] > 1,
        address(grad_x),
        address(grad_logits),
    )


def _tail(x: Tensor, branch: _Term, shortcut: _Term, activation: Activation, coupled: bool) -> tuple[object, ...]:
    n, c, h, w = x.shape
    kind, slope, before_add = activation
    numbers = (DTYPE_CODE[x.dtype], n, h * w, c)
    threads = torch.get_num_threads()
    return (*numbers, branch, shortcut, _KIND_CODE[kind], before_add, address(slope), coupled, threads)


def gated_tail(
    branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool, with_mask: bool
) -> tuple[Tensor, Tensor]:
    """See fusedres.ops.gated_tail."""
    x = branch.x
    out, mask = empty_like(x), x.new_empty(mask_shape(x) if with_mask else (0,), dtype=torch.uint8)
    tail = _tail(x, _term(branch), _term(shortcut), activation, coupled)
    _C.gated_tail(tail, out.data_ptr(), mask.data_ptr() if with_mask else 0)
    return out, mask


def gated_tail_(branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool) -> None:
    """See fusedres.ops.gated_tail."""
    _C.gated_tail(_tail(branch.x, _term(branch), _term(shortcut), activation, coupled), branch.x.data_ptr(), 0)


def gated_tail_reduce(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    with_slope: bool,
) -> Tensor:
    """See fusedres.ops.gated_tail."""
    x, terms = branch.x, (_term(branch), _term(shortcut))
    shape = (tail_groups(branch, shortcut), 1, TAIL_SUMS, x.shape[1])
    dtype = arithmetic_dtype(x.dtype)
    sums = (x.new_empty if x.numel() else x.new_zeros)(shape, dtype=dtype)
    tail = _tail(x, *terms, activation, coupled)
    _C.gated_tail_reduce(tail, gated.grad.data_ptr(), address(gated.gate), with_slope, sums.data_ptr())
    return sums


def gated_tail_apply(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    tail_coefficients: TailCoefficients,
    tail_needs: TailNeeds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See fusedres.ops.gated_tail."""
    x = branch.x
    written = tail_needs.written(branch, shortcut)
    grads = [empty_like(x) if needed else x.new_empty(0) for needed in written]
    at = [grad if needed else None for grad, needed in zip(grads, written, strict=True)]
    of_branch, of_shortcut = tail_coefficients
    tail = _tail(x, _term(branch, of_branch, *at[:2]), _term(shortcut, of_shortcut, *at[2:]), activation, coupled)
    _C.gated_tail_apply(tail, gated.grad.data_ptr(), address(gated.gate))
    return grads[0], grads[1], grads[2], grads[3]
