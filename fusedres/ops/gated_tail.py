"""The gated residual tail, which every residual block ends with: two terms, gates, BatchNorms and an activation.

    out = act(s⊙F + c⊙S)        or, with the activation before the add,        out = s⊙act(F) + c⊙S

F and S are tensors, or BatchNorms of raw ones. s and c are absent, one value for each channel, or for each sample and
channel, or σ(logits) with logits of the tensor's size; a coupled carry is c = 1 − σ(logits of F). With S absent it is
the activation of a BatchNorm. One pass forward; backward a pass for the sums over the batch and a pass for the
gradients. Nothing is kept for it but the inputs, and one bit for each element of a ReLU after the add.

| block                                                                      | is                          |
| -------------------------------------------------------------------------- | --------------------------- |
| ResNet (He et al. 2015)                                                    | relu(BN(y) + x)             |
| pre-activation (He et al. 2016)                                            | F + x                       |
| Highway (Srivastava et al. 2015)                                           | σ(t)⊙act(y) + (1 − σ(t))⊙x  |
| squeeze-and-excitation (Hu et al. 2018), s for each sample and channel     | relu(s⊙BN(y) + x)           |
| LayerScale (Touvron et al. 2021), s for each channel                       | s⊙F + x                     |
| ReZero (Bachlechner et al. 2020), SkipInit (De and Smith 2020), s a scalar | s⊙F + x                     |
| stochastic depth (Huang et al. 2016), s for each sample                    | relu(s⊙BN(y) + x)           |
| YOLO (ultralytics)                                                         | silu(BN(y)) + x             |
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Rows, activation, bits, wide
from fusedres.ops._library import op
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

_TERMS: Rows = {
    "branch": activation("N C H W"),
    "branch_state": wide("4 C"),
    "branch_factor": wide("G C"),
    "branch_logits": activation("N C H W", not_with="branch_factor"),
    "shortcut": activation("N C H W", remedy="subsample and pad the shortcut, or was its projection skipped?"),
    "shortcut_state": wide("4 C", only_with="shortcut"),
    "shortcut_factor": wide("J C", only_with="shortcut"),
    "shortcut_logits": activation("N C H W", only_with="shortcut", not_with="shortcut_factor"),
    "slope": wide("C"),
}


def _check_tail(call: Call) -> None:
    kind = call["kind"]
    if kind not in ACTIVATIONS:
        call.fail(ValueError, "kind", f"be one of {', '.join(ACTIVATIONS)}", repr(kind))
    if (call["slope"] is None) == (kind == "leaky_relu"):
        got = "None" if call["slope"] is None else "a tensor"
        call.fail(ValueError, "slope", "be given for leaky_relu, and for no other kind", f"{got} for {kind}")
    samples = call["branch"].shape[0]
    for name in ("branch_factor", "shortcut_factor"):
        factor = call[name]
        if factor is not None and factor.shape[0] not in (1, samples):
            expected = f"have 1 row, or {samples} like branch {tuple(call['branch'].shape)}"
            call.fail(ShapeError, name, expected, tuple(factor.shape))
    if not call["coupled"]:
        return
    for name in ("branch_logits", "shortcut"):
        if call[name] is None:
            call.fail(ValueError, name, "be given if coupled", "None", "the carry is 1 − σ(branch_logits)")
    for name in ("shortcut_factor", "shortcut_logits"):
        if call[name] is not None:
            call.fail(ValueError, name, "be None if coupled", "a tensor", "the carry is 1 − σ(branch_logits)")


@op("gated_tail", _TERMS, relations=_check_tail)
def gated_tail(
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool = False,
    with_mask: bool = False,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """act(s⊙F + c⊙S), or s⊙act(F) + c⊙S.

    Args:
        branch, shortcut: F with its s, S with its c; without a shortcut only the activation of F is left.
        coupled: c is 1 − σ(logits of the branch).

    Returns:
        out like the branch's x; with with_mask the packed bits (N, H, W, ceil(C / 8)) in uint8, see Gated: set where a
        ReLU's argument is NOT <= 0, and a leaky ReLU's is > 0; else an empty tensor.
    """
    out = torch.empty_like(branch.x, memory_format=torch.channels_last)
    return out, out.new_empty(mask_shape(out) if with_mask else (0,), dtype=torch.uint8)


@op("gated_tail", _TERMS, writes=("branch",), relations=_check_tail)
def gated_tail_(
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool = False,
    *,
    backend: str,
) -> None:
    """gated_tail, written over the branch's x: nothing is allocated. Arguments as in gated_tail."""


def _tiles(x: Tensor, groups: int, backend: str) -> int:
    if backend != "triton":
        return 1
    tiles: int = import_module("fusedres.kernels.gated_tail.configs").tiles_of(x.numel() // x.shape[1], groups, x)
    return tiles


_GRADIENT: Rows = {"grad": activation("N C H W"), "gate": bits("N C H W"), **_TERMS}


def _check_gradient(call: Call) -> None:
    _check_tail(call)
    if call["gate"] is not None and (call["kind"] not in ("relu", "leaky_relu") or call["before_add"]):
        remedy = "the activation's argument is computed again"
        call.fail(ValueError, "gate", "be None but for a ReLU or leaky ReLU after the add", "a tensor", remedy)


def _check_slope(call: Call) -> None:
    _check_gradient(call)
    if call["with_slope"] and (call["kind"] != "leaky_relu" or call["gate"] is not None):
        remedy = "its gradient is a sum of the activation's argument, which a mask does not have"
        call.fail(ValueError, "with_slope", "be False but for a leaky ReLU without a gate", "True", remedy)


@op("gated_tail", _GRADIENT, relations=_check_slope)
def gated_tail_reduce(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool = False,
    with_slope: bool = False,
    *,
    backend: str,
) -> Tensor:
    """The sums over the rows of a batch, or of each sample, that the backward of gated_tail needs.

    With d the gradient of out, z the activation's argument, A = act(F) or F, and without the factors in s and c:

        after the add:   e = act'(z)⊙d        q = σ_s⊙e             p = σ_c⊙e
        before it:       e = d                q = act'(F)⊙σ_s⊙e     p = σ_c⊙e

    so that dF = factor_s⊙q and dS = factor_c⊙p. x̂ = (x − mean)·invstd with a state, x without.

    Args:
        gated: the gradient, and the mask of gated_tail; without a mask z is computed again.
        shortcut: a tensor of this shape that is not read if it has neither state nor factor, and z is not needed:
            with a mask, with an activation before the add, or without an activation.
        with_slope: also the gradient of the slope.

    Returns:
        (G, T, 6, C), to be summed over T; G = N if a factor has a row for each sample, else 1. The rows are Σq, Σq·x̂,
        Σp·x̂ of the shortcut, Σp, Σσ_s⊙e⊙A, and the slope's Σd⊙z over z <= 0, or before the add Σσ_s⊙e⊙F over F <= 0.
        The third and fourth are 0 where the shortcut has neither state nor factor, the fifth but for a factor and an
        activation before the add, the last without with_slope.
    """
    groups = tail_groups(branch, shortcut)
    shape = (groups, _tiles(branch.x, groups, backend), TAIL_SUMS, branch.x.shape[1])
    return branch.x.new_empty(shape, dtype=arithmetic_dtype(branch.x.dtype))


_COEFFICIENTS: Rows = {
    "branch_coefficients": wide("K 4 C", given_with="branch_state"),
    "shortcut_coefficients": wide("L 4 C", given_with="shortcut_state"),
}


def _check_needs(call: Call) -> None:
    _check_gradient(call)
    groups = max(
        1, *(1 if call[name] is None else call[name].shape[0] for name in ("branch_factor", "shortcut_factor"))
    )
    for name in ("branch_coefficients", "shortcut_coefficients"):
        rows = call[name]
        if rows is not None and rows.shape[0] not in (1, groups):
            expected = f"have 1 row, or {groups} like the factors"
            call.fail(ShapeError, name, expected, tuple(rows.shape))
    if call["needs_shortcut"] and call["shortcut"] is None:
        call.fail(ValueError, "needs_shortcut", "be False without a shortcut", "True")
    if call["needs_logits"] and call["branch_logits"] is None and call["shortcut_logits"] is None:
        call.fail(ValueError, "needs_logits", "be False without logits", "True")


@op("gated_tail", {**_GRADIENT, **_COEFFICIENTS}, relations=_check_needs)
def gated_tail_apply(
    gated: Gated,
    branch: TailTerm,
    shortcut: TailTerm | None,
    activation: Activation,
    coupled: bool,
    tail_coefficients: TailCoefficients,
    tail_needs: TailNeeds,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of both terms' x and logits, with the values of gated_tail_reduce.

    grad_x = a·(factor⊙q − c1 − (x − μ)·k) with the coefficients of BatchNorm, factor⊙q without; the same with p for the
    shortcut. Coefficients are those of the batch, or of each sample if there are factors of each sample. The logits'
    gradients are e⊙A⊙σ_s⊙(1 − σ_s), or e⊙(A − S)⊙σ_s⊙(1 − σ_s) if coupled, and e⊙S⊙σ_c⊙(1 − σ_c).

    Returns:
        the gradients of the branch's x and logits, and of the shortcut's; empty ones where they are not needed or there
        is no such tensor.
    """
    x, written = branch.x, tail_needs.written(branch, shortcut)
    like = [torch.empty_like(x, memory_format=torch.channels_last) if each else x.new_empty(0) for each in written]
    return like[0], like[1], like[2], like[3]
