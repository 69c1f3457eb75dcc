"""The one-pass tail: a block's last 1x1 convolution, its BatchNorm, the shortcut and ReLU in one GEMM, and backward.

The statistics of the convolution's output are known before it runs (ops.gram_statistics, ops.one_pass_statistics), so
BatchNorm folds into its weight. With z' = z − t the centred input (M×C), rounded to its dtype, a = scale, s = Σz':

    W̃ = round(a⊙W)        b = β − W̃·s/M        out = relu(z'·W̃ᵀ + b + S)

A projection shortcut joins the same sum as x'·W̃ₓᵀ + bₓ. Backward has the raw output neither; with d the gradient that
passes the ReLU (M×K) and G = dᵀz' (K×C), everything follows as in ops.one_pass:

    dz = d·W̃ − z'·Q̃ + (s/M)ᵀQ̃ − (Σd/M)ᵀW̃,  Q̃ = round(Wᵀ·diag(c2)·W)

The constants come from the rounded W̃ and Q̃, so that rounding cannot shift a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.kernels.one_pass_tail.reference import ROWS_A_PARTIAL
from fusedres.ops import _checks
from fusedres.ops._library import Op


def _matrix_shape(op: str, conv_weight: Tensor) -> tuple[int, int]:
    """(K, C) of a 1x1 convolution's weight."""
    if conv_weight.dim() != 4 or conv_weight.shape[2:] != (1, 1):
        raise ValueError(
            f"{op}: conv_weight must have shape (K, C, 1, 1), got {tuple(conv_weight.shape)}; "
            "the one-pass tail is for 1x1 convolutions without groups"
        )
    if conv_weight.dtype not in _checks.FLOATING:
        raise TypeError(f"{op}: conv_weight must be float32, float64, bfloat16 or float16, got {conv_weight.dtype}")
    return conv_weight.shape[0], conv_weight.shape[1]


def _positive_count(op: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{op}: count must be at least 1, got {count}")


def _low(op: str, dtype: torch.dtype) -> torch.dtype:
    """The arithmetic dtype of activations of this dtype."""
    if dtype not in _checks.FLOATING:
        raise TypeError(f"{op}: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    return torch.float64 if dtype is torch.float64 else torch.float32


def _check_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype, backend: str
) -> None:
    op = "one_pass_fold"
    channels, in_channels = _matrix_shape(op, conv_weight)
    _checks.dense(op, "state", state, (4, channels), _low(op, dtype), conv_weight)
    _checks.dense(op, "total", total, (in_channels,), torch.float64, conv_weight)
    _positive_count(op, count)


def _fake_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    channels, in_channels = conv_weight.shape[:2]
    return conv_weight.new_empty((channels, in_channels), dtype=dtype), state.new_empty(channels)


ONE_PASS_FOLD = Op(
    "one_pass_fold(Tensor conv_weight, Tensor state, Tensor total, int count, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor)",
    "one_pass_tail",
    _check_fold,
    _fake_fold,
)


def one_pass_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """BatchNorm folded into the 1x1 convolution before it: BN(z·Wᵀ) = z'·W̃ᵀ + b.

    Args:
        conv_weight: (K, C, 1, 1), floating point: the master weight, rounded once, here.
        state: (4, K) of one_pass_statistics.
        total, count: s (C,) of gram_statistics and the rows behind it.
        dtype: of the activations.
        backend: "reference" or "triton".

    Returns:
        W̃ (K, C) in dtype, contiguous; b (K,) in the state's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape, dtype, or device.
    """
    folded, offset = ONE_PASS_FOLD(conv_weight, state, total, count, dtype, backend)
    return folded, offset


def _grid(z: Tensor, stride: int) -> tuple[int, int, int]:
    """(N, P, Q) of every stride-th pixel."""
    n, _, h, w = z.shape
    return n, _checks.subsampled(h, stride), _checks.subsampled(w, stride)


def _check_centred(op: str, prefix: str, z: Tensor, state: Tensor | None, pivot: Tensor, stride: int) -> None:
    """What z' is made of."""
    if state is not None:
        _checks.state(op, "state", state, z)
    _checks.dense(op, f"{prefix}pivot", pivot, (z.shape[1],), _checks.arithmetic_dtype(z), z)
    if stride < 1:
        raise ValueError(f"{op}: {prefix}stride must be at least 1, got {stride}")


def _check_same_grid(op: str, name: str, got: tuple[int, ...], want: tuple[int, ...]) -> None:
    if got != want:
        raise ValueError(f"{op}: {name} must reach (N, P, Q) = {want} with its stride, got {got}")


def _check_tail(
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    offset: Tensor,
    stride: int,
    shortcut: Tensor | None,
    shortcut_state: Tensor | None,
    shortcut_stride: int,
    x: Tensor | None,
    x_pivot: Tensor | None,
    x_folded: Tensor | None,
    x_offset: Tensor | None,
    x_stride: int,
    with_mask: bool,
    backend: str,
) -> None:
    op = "one_pass_tail"
    _checks.activation(op, "z", z, backend)
    _check_centred(op, "", z, state, pivot, stride)
    channels = folded.shape[0]
    wide = _checks.arithmetic_dtype(z)
    _checks.dense(op, "folded", folded, (channels, z.shape[1]), z.dtype, z)
    _checks.dense(op, "offset", offset, (channels,), wide, z)
    grid = _grid(z, stride)
    if (shortcut is None) == (x is None):
        raise ValueError(f"{op}: exactly one of shortcut and x must be given, got {'none' if x is None else 'both'}")
    if x is not None:
        if x_pivot is None or x_folded is None or x_offset is None:
            raise ValueError(f"{op}: x_pivot, x_folded and x_offset must be given with x, got None")
        _checks.same_kind(op, "x", x, "z", z)
        _check_centred(op, "x_", x, None, x_pivot, x_stride)
        _checks.dense(op, "x_folded", x_folded, (channels, x.shape[1]), z.dtype, z)
        _checks.dense(op, "x_offset", x_offset, (channels,), wide, z)
        _check_same_grid(op, "x", _grid(x, x_stride), grid)
    if shortcut is not None:
        _checks.same_kind(op, "shortcut", shortcut, "z", z)
        _checks.positive_stride(op, shortcut_stride)
        _check_same_grid(op, "shortcut", _grid(shortcut, shortcut_stride), grid)
        if shortcut_state is not None:
            _checks.dense(op, "shortcut_state", shortcut_state, (4, channels), wide, z)
            if shortcut.shape[1] != channels or shortcut_stride != 1:
                raise ValueError(
                    f"{op}: shortcut must have {channels} channels and shortcut_stride 1 with a shortcut_state, got "
                    f"{shortcut.shape[1]} and {shortcut_stride}; a normalised shortcut is neither strided nor padded"
                )
        elif shortcut.shape[1] > channels:
            raise ValueError(
                f"{op}: shortcut must have at most {channels} channels like folded, got {shortcut.shape[1]}; was the "
                "downsample branch skipped?"
            )


def _fake_tail(z: Tensor, state: Tensor | None, pivot: Tensor, folded: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    stride, with_mask = rest[1], rest[-2]
    assert isinstance(stride, int | torch.SymInt)
    n, p, q = _grid(z, stride)  # type: ignore[arg-type]
    shape = (n, folded.shape[0], p, q)
    out = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    return out, z.new_empty(_checks.mask_shape(out) if with_mask else (0,), dtype=torch.uint8)


ONE_PASS_TAIL = Op(
    "one_pass_tail(Tensor z, Tensor? state, Tensor pivot, Tensor folded, Tensor offset, int stride, Tensor? shortcut, "
    "Tensor? shortcut_state, int shortcut_stride, Tensor? x, Tensor? x_pivot, Tensor? x_folded, Tensor? x_offset, "
    "int x_stride, bool with_mask, str backend) -> (Tensor, Tensor)",
    "one_pass_tail",
    _check_tail,
    _fake_tail,
)


def one_pass_tail(
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    offset: Tensor,
    backend: str,
    stride: int = 1,
    shortcut: Tensor | None = None,
    shortcut_state: Tensor | None = None,
    shortcut_stride: int = 1,
    x: Tensor | None = None,
    x_pivot: Tensor | None = None,
    x_folded: Tensor | None = None,
    x_offset: Tensor | None = None,
    x_stride: int = 1,
    with_mask: bool = False,
) -> tuple[Tensor, Tensor]:
    """relu(z'·W̃ᵀ + b + S): convolution, BatchNorm, shortcut and ReLU of a residual block's tail (He et al. 2015).

    z' = relu(scale·z + shift) − pivot, or z − pivot without a state, rounded to z's dtype, at every stride-th pixel.
    S is a shortcut, taken as in bn_add_relu; or, where x is given instead, the projection x'·W̃ₓᵀ + bₓ of
    x' = x − x_pivot at every x_stride-th pixel, summed up in the same accumulator.

    Args:
        z: (N, C, H, W), channels_last; float32, float64, bfloat16 or float16.
        state: (4, C) of bn_statistics, of the BatchNorm before z's ReLU; None: z is the convolution's input itself.
        pivot: (C,), float64 for float64 z, else float32, of gram_statistics.
        folded, offset: W̃ (K, C) in z's dtype and b (K,) in the pivot's, of one_pass_fold.
        backend: "reference" or "triton".
        stride: at least 1; ceil(H / stride) = P, ceil(W / stride) = Q.
        shortcut: (N, K', H', W'), K' <= K, which reaches (P, Q) with shortcut_stride; dtype and layout of z.
        shortcut_state: (4, K), for a shortcut of the result's shape; None: no affine map.
        x: (N, C', H'', W''), which reaches (P, Q) with x_stride; dtype and layout of z.
        x_pivot, x_folded, x_offset: (C',), (K, C'), (K,), as those of z.
        with_mask: also return the ReLU's mask.

    Returns:
        out (N, K, P, Q), channels_last, z's dtype; the packed bits (N, P, Q, ceil(K / 8)) uint8 of bn_add_relu, an
        empty tensor without with_mask.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device; both or none of shortcut and x.
    """
    out, mask = ONE_PASS_TAIL(
        z,
        state,
        pivot,
        folded,
        offset,
        stride,
        shortcut,
        shortcut_state,
        shortcut_stride,
        x,
        x_pivot,
        x_folded,
        x_offset,
        x_stride,
        with_mask,
        backend,
    )
    return out, mask


def _check_gradient(op: str, grad: Tensor, gate: Tensor, z: Tensor, stride: int, backend: str) -> None:
    """d, on the grid of z's strided pixels."""
    _checks.activation(op, "grad", grad, backend)
    _checks.dense(op, "gate", gate, _checks.mask_shape(grad), torch.uint8, grad)
    _checks.same_kind(op, "z", z, "grad", grad)
    _checks.positive_stride(op, stride)
    _check_same_grid(op, "z", _grid(z, stride), _grid(grad, 1))


def _check_reduce(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    stride: int,
    x: Tensor | None,
    x_pivot: Tensor | None,
    x_stride: int,
    backend: str,
) -> None:
    op = "one_pass_reduce"
    _check_gradient(op, grad, gate, z, stride, backend)
    _check_centred(op, "", z, state, pivot, stride)
    if x is None:
        return
    if x_pivot is None:
        raise ValueError(f"{op}: x_pivot must be given with x, got None")
    _checks.same_kind(op, "x", x, "grad", grad)
    _check_centred(op, "x_", x, None, x_pivot, x_stride)
    _check_same_grid(op, "x", _grid(x, x_stride), _grid(grad, 1))


def _fake_reduce(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    stride: int,
    x: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    channels = grad.shape[1]
    cross = pivot.new_empty((channels, z.shape[1]))
    return cross, pivot.new_empty((channels, 0 if x is None else x.shape[1])), pivot.new_empty(channels)


ONE_PASS_REDUCE = Op(
    "one_pass_reduce(Tensor grad, Tensor gate, Tensor z, Tensor? state, Tensor pivot, int stride, Tensor? x, "
    "Tensor? x_pivot, int x_stride, str backend) -> (Tensor, Tensor, Tensor)",
    "one_pass_tail",
    _check_reduce,
    _fake_reduce,
)


def one_pass_reduce(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    backend: str,
    stride: int = 1,
    x: Tensor | None = None,
    x_pivot: Tensor | None = None,
    x_stride: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reductions of the tail's backward: dᵀz', dᵀx' and Σd, with d = grad where the gate is open, else 0.

    Args:
        grad: (N, K, P, Q), channels_last; left as it is.
        gate: (N, P, Q, ceil(K / 8)) uint8, the mask of one_pass_tail.
        z, state, pivot, stride, x, x_pivot, x_stride: as in one_pass_tail.
        backend: "reference" or "triton".

    Returns:
        dᵀz' (K, C); dᵀx' (K, C'), (K, 0) without x; Σd (K,): float64 for float64, else float32, each the same bits at
        every call.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device.
    """
    cross, x_cross, sum_d = ONE_PASS_REDUCE(grad, gate, z, state, pivot, stride, x, x_pivot, x_stride, backend)
    return cross, x_cross, sum_d


def _check_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    count: int,
    dtype: torch.dtype,
    backend: str,
) -> None:
    op = "one_pass_products"
    shape = _matrix_shape(op, conv_weight)
    wide = _low(op, dtype)
    _checks.dense(op, "cross", cross, shape, wide, conv_weight)
    _checks.dense(op, "sum_d", sum_d, shape[:1], wide, conv_weight)
    _checks.dense(op, "folded", folded, shape, dtype, conv_weight)
    _checks.dense(op, "state", state, (4, shape[0]), wide, conv_weight)
    _checks.dense(op, "projected", projected, shape, wide, conv_weight)
    _checks.dense(op, "total", total, shape[1:], torch.float64, conv_weight)
    _positive_count(op, count)


def _fake_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    count: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = folded.shape[1]
    quadratic = folded.new_empty((channels, channels))
    return torch.empty_like(conv_weight), torch.empty_like(sum_d), quadratic, sum_d.new_empty(channels)


ONE_PASS_PRODUCTS = Op(
    "one_pass_products(Tensor cross, Tensor sum_d, Tensor conv_weight, Tensor folded, Tensor state, Tensor projected, "
    "Tensor total, int count, ScalarType dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    "one_pass_tail",
    _check_products,
    _fake_products,
)


def one_pass_products(
    cross: Tensor,
    sum_d: Tensor,
    conv_weight: Tensor,
    folded: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    count: int,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What backward makes of the reductions: products no larger than C×C×K, whatever the batch.

    Args:
        cross, sum_d: dᵀz' (K, C) and Σd (K,) of one_pass_reduce.
        conv_weight, folded: (K, C, 1, 1), and its W̃ (K, C) of one_pass_fold.
        state, projected, total, count: of one_pass_statistics and gram_statistics; count rows.
        dtype: of the activations.
        backend: "reference" or "triton".

    Returns:
        The gradient of conv_weight, its shape, strides and dtype; dγ (K,); Q̃ (C, C) in dtype; dz's constant row (C,).
        dβ is sum_d.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape, dtype, or device.
    """
    grad_conv, grad_weight, quadratic, constant = ONE_PASS_PRODUCTS(
        cross, sum_d, conv_weight, folded, state, projected, total, count, dtype, backend
    )
    return grad_conv, grad_weight, quadratic, constant


def _check_dgrad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    stride: int,
    masked: bool,
    backend: str,
) -> None:
    op = "one_pass_dgrad"
    _check_gradient(op, grad, gate, z, stride, backend)
    _check_centred(op, "", z, state, pivot, stride)
    channels = z.shape[1]
    _checks.dense(op, "folded", folded, (grad.shape[1], channels), grad.dtype, grad)
    _checks.dense(op, "quadratic", quadratic, (channels, channels), grad.dtype, grad)
    _checks.dense(op, "constant", constant, (channels,), _checks.arithmetic_dtype(grad), grad)
    if masked and state is None:
        raise ValueError(f"{op}: masked must be False without a state, got True; there is no ReLU before z then")


def _fake_dgrad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    stride: int,
    masked: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    n, _, p, q = grad.shape
    channels = z.shape[1]
    out = torch.empty((n, channels, p, q), dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    tiles = (n * p * q + ROWS_A_PARTIAL - 1) // ROWS_A_PARTIAL if masked else 0
    return out, pivot.new_empty((tiles, 2, channels))


ONE_PASS_DGRAD = Op(
    "one_pass_dgrad(Tensor grad, Tensor gate, Tensor z, Tensor? state, Tensor pivot, Tensor folded, Tensor quadratic, "
    "Tensor constant, int stride, bool masked, str backend) -> (Tensor, Tensor)",
    "one_pass_tail",
    _check_dgrad,
    _fake_dgrad,
)


def one_pass_dgrad(
    grad: Tensor,
    gate: Tensor,
    z: Tensor,
    state: Tensor | None,
    pivot: Tensor,
    folded: Tensor,
    quadratic: Tensor,
    constant: Tensor,
    backend: str,
    stride: int = 1,
    masked: bool = False,
) -> tuple[Tensor, Tensor]:
    """dz = d·W̃ − z'·Q̃ + constant, at every stride-th pixel of z; d, z' as in one_pass_reduce.

    Args:
        grad, gate, z, state, pivot, stride: as in one_pass_reduce.
        folded: W̃ (K, C). quadratic, constant: Q̃ (C, C) and the constant row (C,) of one_pass_products.
        backend: "reference" or "triton".
        masked: also pass back through the ReLU before z: dz where NOT (scale·z + shift <= 0), else 0.

    Returns:
        dz (N, C, P, Q), channels_last, z's dtype; with masked the partial sums (T, 2, C) of Σdz and Σdz·x̂, of dz as
        stored and x̂ = (z − mean)·invstd, over ROWS_A_PARTIAL rows each, float64 for float64, else float32; without
        it (0, 2, C).

    Raises:
        ValueError, TypeError, RuntimeError: a wrong shape or layout, dtype, or device; masked without a state.
    """
    grad_z, partials = ONE_PASS_DGRAD(grad, gate, z, state, pivot, folded, quadratic, constant, stride, masked, backend)
    return grad_z, partials
