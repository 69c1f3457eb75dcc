"""The one-pass tail: a block's last 1x1 convolution, its BatchNorm, the shortcut and ReLU in one GEMM.

The statistics of the convolution's output are known before it runs (ops.gram_statistics, ops.one_pass_statistics), so
BatchNorm folds into its weight. With z' = z − t the centred input (M×C), rounded to its dtype, a = scale, s = Σz':

    W̃ = round(a⊙W)        b = β − W̃·s/M        out = relu(z'·W̃ᵀ + b + S)

A projection shortcut joins the same sum as x'·W̃ₓᵀ + bₓ. The constant comes from the rounded W̃, so that rounding cannot
shift a mean. Backward is ops.one_pass_tail_backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.ops._arguments import ActivationDtype, Call, Integer, activation, dense, strided, wide
from fusedres.ops._library import Op
from fusedres.ops._sizes import mask_shape, subsampled


def _fake_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    channels, in_channels = conv_weight.shape[:2]
    return conv_weight.new_empty((channels, in_channels), dtype=dtype), state.new_empty(channels)


ONE_PASS_FOLD = Op(
    "one_pass_fold(Tensor conv_weight, Tensor state, Tensor total, int count, ScalarType dtype, str backend) "
    "-> (Tensor, Tensor)",
    "one_pass_tail",
    {
        "dtype": ActivationDtype(),
        "conv_weight": strided("K C 1 1", "floating"),
        "state": wide("4 K"),
        "total": dense("C", torch.float64),
        "count": Integer(1, 2**62),
    },
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


def _check_shortcut(call: Call) -> None:
    shortcut, stride = call["shortcut"], call["shortcut_stride"]
    if shortcut is None and call["x"] is None:
        call.fail(ValueError, "shortcut", "be given where x is None", "None", "pass exactly one of the two")
    if call["shortcut_state"] is not None and (shortcut.shape[1] != call.scope.sizes["K"] or stride != 1):
        expected = f"have {call.scope.sizes['K']} channels and shortcut_stride 1 with a shortcut_state"
        remedy = "a normalised shortcut is neither strided nor padded"
        call.fail(ShapeError, "shortcut", expected, f"{shortcut.shape[1]} and {stride}", remedy)


def _fake_tail(z: Tensor, state: Tensor | None, pivot: Tensor, folded: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    stride, with_mask = rest[1], rest[-2]
    assert isinstance(stride, int | torch.SymInt)
    n, _, h, w = z.shape
    p, q = (subsampled(size, stride) for size in (h, w))  # type: ignore[arg-type]
    shape = (n, folded.shape[0], p, q)
    out = torch.empty(shape, dtype=z.dtype, device=z.device, memory_format=torch.channels_last)
    return out, z.new_empty(mask_shape(out) if with_mask else (0,), dtype=torch.uint8)


ONE_PASS_TAIL = Op(
    "one_pass_tail(Tensor z, Tensor? state, Tensor pivot, Tensor folded, Tensor offset, int stride, Tensor? shortcut, "
    "Tensor? shortcut_state, int shortcut_stride, Tensor? x, Tensor? x_pivot, Tensor? x_folded, Tensor? x_offset, "
    "int x_stride, bool with_mask, str backend) -> (Tensor, Tensor)",
    "one_pass_tail",
    {
        "stride": Integer(1),
        "z": activation("N C P*stride Q*stride"),
        "state": wide("4 C"),
        "pivot": wide("C"),
        "folded": dense("K C", "x"),
        "offset": wide("K"),
        "shortcut_stride": Integer(1),
        "shortcut": activation(
            "N L<=K P*shortcut_stride Q*shortcut_stride", not_with="x", remedy="was the downsample branch skipped?"
        ),
        "shortcut_state": wide("4 K", only_with="shortcut"),
        "x_stride": Integer(1),
        "x": activation("N D P*x_stride Q*x_stride"),
        "x_pivot": wide("D", given_with="x"),
        "x_folded": dense("K D", "x", given_with="x"),
        "x_offset": wide("K", given_with="x"),
    },
    _fake_tail,
    _check_shortcut,
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
