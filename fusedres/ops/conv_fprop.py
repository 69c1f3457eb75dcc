"""Convolutions with BatchNorm fused around them: on load and as statistics in training, on store in inference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fusedres.kernels.conv_fprop.geometry import empty_output, output_shape
from fusedres.ops import _checks
from fusedres.ops._library import Op


def _check_convolution(
    op: str,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    backend: str,
) -> None:
    _checks.activation(op, "x", x, backend)
    _checks.same_kind(op, "weight", weight, "x", x)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: weight must have shape (K, {x.shape[1]}, R, S) for the {x.shape[1]} channels of x, "
            f"got {tuple(weight.shape)}; grouped convolutions are not supported"
        )
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight must not be empty, got shape {tuple(weight.shape)}")
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{op}: {name} must be two integers of at least {least}, got {tuple(pair)}")
    shape = output_shape(x, weight, stride, padding, dilation)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"{op}: x must be at least as large as the dilated weight, got an output of {shape[2]}x{shape[3]} pixels "
            f"for x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )
    if shape[0] * shape[2] * shape[3] > 2**31 - 2**10:
        raise ValueError(f"{op}: the output must have fewer than 2^31 pixels, got N·P·Q of {shape[0]}x{shape[2:]}")


def _check_conv_fprop(
    x: Tensor,
    weight: Tensor,
    state: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    with_statistics: bool,
    backend: str,
) -> None:
    _check_convolution("conv_fprop", x, weight, stride, padding, dilation, backend)
    if state is not None:
        _checks.state("conv_fprop", "state", state, x)


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
    dtype = _checks.arithmetic_dtype(x)
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
    _check_conv_fprop,
    _fake_conv_fprop,
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


def _check_conv_bn_add_relu(
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
) -> None:
    op = "conv_bn_add_relu"
    _check_convolution(op, x, weight, stride, padding, dilation, backend)
    out = output_shape(x, weight, stride, padding, dilation)
    _checks.dense(op, "state", state, (4, out[1]), _checks.arithmetic_dtype(x), x)
    if shortcut is None:
        if shortcut_state is not None:
            raise ValueError(f"{op}: shortcut_state must be None without a shortcut, got a tensor")
        return
    _checks.same_kind(op, "shortcut", shortcut, "x", x)
    if shortcut_state is not None:
        _checks.dense(op, "shortcut_state", shortcut_state, (4, out[1]), _checks.arithmetic_dtype(x), x)
        if shortcut.shape != out:
            raise ValueError(
                f"{op}: shortcut must have shape {out} like the output, got {tuple(shortcut.shape)}; "
                "a normalised shortcut is neither strided nor padded"
            )
    _checks.positive_stride(op, shortcut_stride)
    n, c, h, w = shortcut.shape
    reached = (n, _checks.subsampled(h, shortcut_stride), _checks.subsampled(w, shortcut_stride))
    if reached != (out[0], out[2], out[3]) or c > out[1]:
        raise ValueError(
            f"{op}: shortcut must reach shape {out} of the output with stride {shortcut_stride} and zero channels "
            f"appended, got {tuple(shortcut.shape)}; was the downsample branch skipped?"
        )


CONV_BN_ADD_RELU = Op(
    "conv_bn_add_relu(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, Tensor state, "
    "Tensor? shortcut, Tensor? shortcut_state, int shortcut_stride, str backend) -> Tensor",
    "conv_fprop",
    _check_conv_bn_add_relu,
    lambda x, weight, stride, padding, dilation, *_: empty_output(x, weight, stride, padding, dilation),
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
