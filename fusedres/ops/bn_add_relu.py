"""The tail of a residual block: BatchNorm's affine map, shortcut, ReLU, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op


def _check_tail(
    x: Tensor,
    state: Tensor,
    shortcut: Tensor,
    shortcut_state: Tensor | None,
    stride: int,
    with_mask: bool,
    backend: str,
) -> None:
    _checks.activation("bn_add_relu", "x", x, backend)
    _checks.state("bn_add_relu", "state", state, x)
    _checks.same_kind("bn_add_relu", "shortcut", shortcut, "x", x)
    if shortcut_state is not None:
        _checks.state("bn_add_relu", "shortcut_state", shortcut_state, x)
        _checks.same("bn_add_relu", "shortcut", shortcut, "x", x, "a normalised shortcut is neither strided nor padded")
    _checks.positive_stride("bn_add_relu", stride)
    n, c, h, w = shortcut.shape
    reached = (n, _checks.subsampled(h, stride), _checks.subsampled(w, stride))
    if reached != (x.shape[0], x.shape[2], x.shape[3]) or c > x.shape[1]:
        raise ValueError(
            f"bn_add_relu: shortcut must reach shape {tuple(x.shape)} of x with stride {stride} and zero channels "
            f"appended, got {tuple(shortcut.shape)}; was the downsample branch skipped?"
        )


def _fake(
    x: Tensor,
    state: Tensor,
    shortcut: Tensor,
    shortcut_state: Tensor | None,
    stride: int,
    with_mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = x.new_empty(_checks.mask_shape(x) if with_mask else (0,), dtype=torch.uint8)
    return torch.empty_like(x, memory_format=torch.channels_last), mask


BN_ADD_RELU = Op(
    "bn_add_relu(Tensor x, Tensor state, Tensor shortcut, Tensor? shortcut_state, int stride, bool with_mask, "
    "str backend) -> (Tensor, Tensor)",
    "bn_add_relu",
    _check_tail,
    _fake,
)


def bn_add_relu(
    x: Tensor,
    state: Tensor,
    shortcut: Tensor,
    backend: str,
    shortcut_state: Tensor | None = None,
    stride: int = 1,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """relu(scale·x + shift + S): the second half of a residual block (He et al. 2015).

    S is the shortcut as it is; or normalised with its own state (a projection); or every stride-th of its pixels with
    zero channels appended up to x's (option A).

    Args:
        x: (N, C, P, Q), channels_last; float32, float64, bfloat16 or float16.
        state: (4, C) of bn_statistics or bn_frozen.
        shortcut: (N, C', H, W), C' <= C, ceil(H / stride) = P, ceil(W / stride) = Q; dtype and layout of x.
        backend: "reference", "cpu" or "triton".
        shortcut_state: (4, C), for a shortcut of x's shape; None: no affine map.
        stride: at least 1.
        with_mask: also return the ReLU's mask.

    Returns:
        out like x, and the packed bits (N, P, Q, ceil(C / 8)) uint8, set where NOT (out <= 0), channel 8k + j in bit j
        of byte k; an empty tensor without with_mask.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    out, mask = BN_ADD_RELU(x, state, shortcut, shortcut_state, stride, with_mask, backend)
    return out, mask


BN_ADD_RELU_ = Op(
    "bn_add_relu_(Tensor(a!) x, Tensor state, Tensor shortcut, Tensor? shortcut_state, int stride, bool with_mask, "
    "str backend) -> Tensor",
    "bn_add_relu",
    _check_tail,
    lambda x, state, shortcut, shortcut_state, stride, with_mask, backend: x.new_empty(
        _checks.mask_shape(x) if with_mask else (0,), dtype=torch.uint8
    ),
)


def bn_add_relu_(
    x: Tensor,
    state: Tensor,
    shortcut: Tensor,
    backend: str,
    shortcut_state: Tensor | None = None,
    stride: int = 1,
    with_mask: bool = False,
) -> Tensor:
    """x = relu(scale·x + shift + S) in place; arguments, mask and errors as in bn_add_relu. Returns the mask."""
    mask: Tensor = BN_ADD_RELU_(x, state, shortcut, shortcut_state, stride, with_mask, backend)
    return mask


def _check_out(
    x: Tensor, state: Tensor, shortcut: Tensor, shortcut_state: Tensor | None, stride: int, out: Tensor, backend: str
) -> None:
    _check_tail(x, state, shortcut, shortcut_state, stride, False, backend)
    _checks.same("bn_add_relu_out", "out", out, "x", x)


BN_ADD_RELU_OUT = Op(
    "bn_add_relu_out(Tensor x, Tensor state, Tensor shortcut, Tensor? shortcut_state, int stride, Tensor(a!) out, "
    "str backend) -> ()",
    "bn_add_relu",
    _check_out,
    lambda *_: None,
)


def bn_add_relu_out(
    x: Tensor,
    state: Tensor,
    shortcut: Tensor,
    out: Tensor,
    backend: str,
    shortcut_state: Tensor | None = None,
    stride: int = 1,
) -> None:
    """relu(scale·x + shift + S) into out, like x; arguments and errors as in bn_add_relu."""
    BN_ADD_RELU_OUT(x, state, shortcut, shortcut_state, stride, out, backend)
