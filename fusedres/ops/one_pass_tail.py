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
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation, mask_shape, subsampled
from fusedres.values import Centred, Folded, ShortcutInput


@op(
    "one_pass_tail",
    {
        "dtype": ActivationDtype(),
        "conv_weight": strided("K C 1 1", "floating"),
        "state": wide("4 K"),
        "total": dense("C", torch.float64),
        "count": Integer(1, 2**62),
    },
)
def one_pass_fold(
    conv_weight: Tensor, state: Tensor, total: Tensor, count: int, dtype: torch.dtype, *, backend: str
) -> tuple[Tensor, Tensor]:
    """BatchNorm folded into the 1x1 convolution before it: BN(z·Wᵀ) = z'·W̃ᵀ + b.

    Args:
        conv_weight: (K, C, 1, 1), floating point: the master weight, rounded once, here.
        state: of one_pass_statistics.
        total, count: s (C,) of gram_statistics, and the number of rows in it.
        dtype: of the activations.

    Returns:
        W̃ (K, C) in dtype, contiguous; b (K,) in the state's dtype.
    """
    channels, in_channels = conv_weight.shape[:2]
    return conv_weight.new_empty((channels, in_channels), dtype=dtype), state.new_empty(channels)


def _check_shortcut(call: Call) -> None:
    shortcut, stride = call["shortcut"], call["shortcut_stride"]
    if shortcut is None and call["x"] is None:
        call.fail(ValueError, "shortcut", "be given where x is None", "None", "pass exactly one of the two")
    if call["shortcut_state"] is not None and (shortcut.shape[1] != call.scope.sizes["K"] or stride != 1):
        expected = f"have {call.scope.sizes['K']} channels and shortcut_stride 1 with a shortcut_state"
        remedy = "a normalised shortcut is neither strided nor padded"
        call.fail(ShapeError, "shortcut", expected, f"{shortcut.shape[1]} and {stride}", remedy)


@op(
    "one_pass_tail",
    {
        "z_stride": Integer(1),
        "z": activation("N C P*z_stride Q*z_stride"),
        "z_state": wide("4 C"),
        "z_pivot": wide("C"),
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
        "x_folded_offset": wide("K", given_with="x"),
    },
    relations=_check_shortcut,
)
def one_pass_tail(
    z: Centred,
    z_state: Tensor | None,
    folded: Folded,
    shortcut: ShortcutInput | None,
    x: Centred | None,
    x_folded: Folded | None,
    with_mask: bool = False,
    *,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """relu(z'·W̃ᵀ + b + S): convolution, BatchNorm, shortcut and ReLU of a residual block's tail (He et al. 2015).

    z' is that of Centred, for relu(scale·z + shift) with a state, for z itself without one. S is the shortcut; or,
    where x is given instead, the projection x'·W̃ₓᵀ + bₓ, summed up in the same accumulator.

    Args:
        z: its pivot is of gram_statistics, (C,), float64 for float64 z, else float32.
        z_state: of the BatchNorm before z's ReLU; None: z is the convolution's input itself.
        folded, x_folded: of one_pass_fold.
        shortcut, x: exactly one of the two is given.
        with_mask: also return the ReLU's mask.

    Returns:
        out (N, K, P, Q), an activation in z's dtype; the packed bits (N, P, Q, ceil(K / 8)) uint8 of bn_add_relu, an
        empty tensor without with_mask.
    """
    n, _, h, w = z.z.shape
    out = empty_activation((n, folded.folded.shape[0], subsampled(h, z.stride), subsampled(w, z.stride)), z.z)
    return out, out.new_empty(mask_shape(out) if with_mask else (0,), dtype=torch.uint8)
