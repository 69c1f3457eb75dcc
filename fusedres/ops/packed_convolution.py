"""Convolutions for inference whose weights were folded and packed before: bias, shortcut and ReLU are on the store."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres.errors import ShapeError
from fusedres.kernels.packed_convolution import packed_size, takes_winograd
from fusedres.ops._arguments import Call, Integers, activation, convolution, dense, strided
from fusedres.ops._library import op
from fusedres.ops._shapes import Shape
from fusedres.values import DENSE, Geometry, Packed

_FLOAT = torch.float32


def _check_winograd(call: Call, geometry: Geometry) -> None:
    if call["winograd"] and not takes_winograd([call.scope.sizes[size] for size in "KCRS"], geometry):
        expected = "be False but for 3x3 weights of 16 channels or more, with stride and dilation 1"
        call.fail(ShapeError, "winograd", expected, "True")


def _check_weight(call: Call) -> None:
    _check_winograd(call, DENSE._replace(dilation=call["dilation"]))


@op(
    "packed_convolution",
    {
        "weight": strided("K C R S", _FLOAT, remedy="grouped convolutions are not supported"),
        "dilation": Integers(2, 1),
        "scale": dense("K", _FLOAT),
    },
    relations=_check_weight,
)
def pack_weight(
    weight: Tensor,
    dilation: Sequence[int],
    scale: Tensor | None = None,
    winograd: bool = False,
    *,
    backend: str,
) -> Tensor:
    """scale⊙weight, laid out as packed_convolution_out reads it on this backend, for convolutions of this dilation.

    Args:
        winograd: transform the weight for Winograd's F(2x2, 3x3) (Lavin and Gray 2015,
            https://arxiv.org/abs/1509.09308), which multiplies four times for a pixel and channel, not nine. It takes
            3x3 weights of 16 channels or more, with stride and dilation 1.

    Returns:
        a fresh float32 vector. It is only valid in this process: its order depends on the processor.
    """
    return weight.new_empty(packed_size(weight.shape, winograd))


def _check_panels(call: Call) -> None:
    _check_winograd(call, Geometry(call["stride"], call["padding"], call["dilation"]))
    wanted = packed_size([call.scope.sizes[size] for size in "KCRS"], call["winograd"])
    if call["panels"].numel() != wanted:
        remedy = "was it packed by pack_weight for this kernel and this algorithm?"
        call.fail(ShapeError, "panels", f"have {wanted} elements", call["panels"].numel(), remedy)


@op(
    "packed_convolution",
    {
        "x": activation("N C H W", _FLOAT),
        "bias": dense("K", _FLOAT),
        "kernel": Integers(2, 1, Shape("R S")),
        "panels": dense("L", _FLOAT),
        **convolution("H W", "R S"),
        "shortcut": activation("N K P Q", _FLOAT),
        "out": activation("N K P Q", _FLOAT),
    },
    writes=("out",),
    relations=_check_panels,
)
def packed_convolution_out(
    x: Tensor,
    packed: Packed,
    geometry: Geometry,
    shortcut: Tensor | None,
    with_relu: bool,
    out: Tensor,
    *,
    backend: str,
) -> None:
    """relu(conv(x, weight) + bias + S) into out, or the same without the ReLU.

    Without a shortcut, S is 0. NaN passes the ReLU as in torch, and reaches the same pixels with either algorithm.
    """
