"""Convolutions with BatchNorm fused around them: on load and as statistics in training, on store in inference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.kernels.conv_fprop.geometry import empty_output
from fusedres.ops._arguments import Call, Integer, Row, activation, convolution, wide
from fusedres.ops._library import Op
from fusedres.ops._sizes import arithmetic_dtype

_CONVOLUTION: dict[str, Row] = {
    "x": activation("N C H W"),
    "weight": activation("K C R S", remedy="grouped convolutions are not supported"),
    **convolution("H W", "R S"),
}


def _check_pixels(call: Call) -> None:
    n, p, q = (call.scope.sizes[name] for name in "NPQ")
    if n * p * q > 2**31 - 2**10:
        call.fail(ShapeError, "x", "give an output of fewer than 2³¹ pixels", f"{n}x{p}x{q}", "split the batch")


def _check_normalised_shortcut(call: Call) -> None:
    _check_pixels(call)
    out = tuple(call.scope.sizes[name] for name in "NKPQ")
    shortcut = call["shortcut"]
    if call["shortcut_state"] is not None and shortcut.shape != out:
        remedy = "a normalised shortcut is neither strided nor padded"
        call.fail(ShapeError, "shortcut", f"have shape {out} like the output", tuple(shortcut.shape), remedy)


def _fake_conv_fprop(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    with_statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    y = empty_output(x, weight, stride, padding, dilation)
    dtype = arithmetic_dtype(x)
    if not with_statistics:
        return y, x.new_empty((0,), dtype=dtype), x.new_empty((0,), dtype=dtype)
    tiles = 1
    if backend == "triton":
        from fusedres.kernels.conv_fprop.configs import row_tiles

        tiles = row_tiles(x, weight, y, stride, padding, state is not None)
    return y, x.new_empty((tiles, 2, weight.shape[0]), dtype=dtype), x.new_empty((tiles,), dtype=dtype)


CONV_FPROP = Op(
    "conv_fprop(Tensor x, Tensor weight, Tensor? state, int[2] stride, int[2] padding, int[2] dilation, "
    "bool with_statistics, str backend) -> (Tensor, Tensor, Tensor)",
    "conv_fprop",
    {**_CONVOLUTION, "state": wide("4 C")},
    _fake_conv_fprop,
    _check_pixels,
)


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    with_statistics: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """A convolution whose input is normalised on load and whose output's statistics are taken on store.

    y = conv(h, weight), h = relu(scale·x + shift) in x's dtype, or h = x without a state. The padding is of h: zeros
    stay zeros after the affine map. The statistics are of y as it is stored, tile by tile of its N·P·Q rows, to be
    merged as Chan, Golub and LeVeque (1983) do.

    Args:
        x: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16.
        weight: (K, C, R, S), channels_last, in x's dtype.
        state: (4, C) of bn_statistics or bn_frozen: mean, invstd, scale, shift; None: x is convolved as it is.
        stride, padding, dilation: two integers each, of the rows and of the columns.
        with_statistics: also return the tiles' statistics.
        backend: "reference" or "triton".

    Returns:
        y: (N, K, P, Q), channels_last, in x's dtype.
        partials: (T, 2, K), each tile's mean and sum of squared deviations from it; float64 for float64, else float32.
        rows: (T,), the rows of each tile, in the dtype of partials.
        Without statistics partials and rows are empty.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.

    Not supported: groups, a bias.
    """
    y, partials, rows = CONV_FPROP(x, weight, state, stride, padding, dilation, with_statistics, backend)
    return y, partials, rows


CONV_BN_ADD_RELU = Op(
    "conv_bn_add_relu(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, Tensor state, "
    "Tensor? shortcut, Tensor? shortcut_state, int shortcut_stride, str backend) -> Tensor",
    "conv_fprop",
    {
        **_CONVOLUTION,
        "state": wide("4 K"),
        "shortcut_stride": Integer(1),
        "shortcut": activation(
            "N L<=K P*shortcut_stride Q*shortcut_stride", remedy="was the downsample branch skipped?"
        ),
        "shortcut_state": wide("4 K", only_with="shortcut"),
    },
    lambda x, weight, stride, padding, dilation, *_: empty_output(x, weight, stride, padding, dilation),
    _check_normalised_shortcut,
)


def conv_bn_add_relu(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    state: Tensor,
    shortcut: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_stride: int,
    backend: str,
) -> Tensor:
    """relu(scale·conv(x, weight) + shift + S): a convolution with its BatchNorm, shortcut and ReLU, for inference.

    S is nothing; or the shortcut as it is; or normalised with its own state (a projection); or every stride-th of its
    pixels with zero channels appended up to the output's (option A).

    Args:
        x: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16.
        weight: (K, C, R, S), channels_last, in x's dtype.
        stride, padding, dilation: two integers each, of the rows and of the columns.
        state: (4, K) of bn_frozen or bn_statistics.
        shortcut: None or (N, K', H', W'), K' <= K, ceil(H' / stride) = P, ceil(W' / stride) = Q; dtype and layout of x.
        shortcut_state: (4, K), for a shortcut of the output's shape; None: no affine map.
        shortcut_stride: at least 1.
        backend: "reference" or "triton".

    Returns:
        (N, K, P, Q), channels_last, in x's dtype; NaN passes the ReLU as in torch. Nothing is saved for backward.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.

    Not supported: groups, a bias.
    """
    out: Tensor = CONV_BN_ADD_RELU(
        x, weight, stride, padding, dilation, state, shortcut, shortcut_state, shortcut_stride, backend
    )
    return out
