"""The tail of a residual block: BatchNorm's affine map, shortcut, ReLU, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import Call, Integer, Row, activation, wide
from fusedres.ops._library import Op
from fusedres.ops._sizes import mask_shape

_TAIL: dict[str, Row] = {
    "stride": Integer(1),
    "x": activation("N C P Q"),
    "state": wide("4 C"),
    "shortcut": activation("N L<=C P*stride Q*stride", remedy="was the downsample branch skipped?"),
    "shortcut_state": wide("4 C"),
}


def _check_normalised_shortcut(call: Call) -> None:
    x, shortcut = call["x"], call["shortcut"]
    if call["shortcut_state"] is not None and shortcut.shape != x.shape:
        remedy = "a normalised shortcut is neither strided nor padded"
        call.fail(ShapeError, "shortcut", f"have shape {tuple(x.shape)} like x", tuple(shortcut.shape), remedy)


def _fake(
    x: Tensor,
    state: Tensor,
    shortcut: Tensor,
    shortcut_state: Tensor | None,
    stride: int,
    with_mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    mask = x.new_empty(mask_shape(x) if with_mask else (0,), dtype=torch.uint8)
    return torch.empty_like(x, memory_format=torch.channels_last), mask


BN_ADD_RELU = Op(
    "bn_add_relu(Tensor x, Tensor state, Tensor shortcut, Tensor? shortcut_state, int stride, bool with_mask, "
    "str backend) -> (Tensor, Tensor)",
    "bn_add_relu",
    _TAIL,
    _fake,
    _check_normalised_shortcut,
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
    _TAIL,
    lambda x, state, shortcut, shortcut_state, stride, with_mask, backend: x.new_empty(
        mask_shape(x) if with_mask else (0,), dtype=torch.uint8
    ),
    _check_normalised_shortcut,
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


BN_ADD_RELU_OUT = Op(
    "bn_add_relu_out(Tensor x, Tensor state, Tensor shortcut, Tensor? shortcut_state, int stride, Tensor(a!) out, "
    "str backend) -> ()",
    "bn_add_relu",
    {**_TAIL, "out": activation("N C P Q")},  # written, not read
    lambda *_: None,
    _check_normalised_shortcut,
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
