"""The passes over the buffer of a dense block: its layers read a prefix of the channels, and append their own.

The buffer is an activation (N, D, H, W). A channel's moments do not depend on the layer that reads it, so they are
computed once, when it is appended. Its gradient is a sum over the layers that read it; see dense_bn_relu_backward_.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import ActivationDtype, Argument, Call, Integer, Rows, activation, dense, norm, wide
from fusedres.ops._library import op
from fusedres.ops._sizes import empty_activation
from fusedres.ops.bn_statistics import RUNNING, check_momentum
from fusedres.values import BnBranch, Norm, arithmetic_dtype


def _per_channel(channels: str, **options: str) -> Argument:
    """Two numbers for each channel, in float64 for every dtype of the activations."""
    return dense(f"{channels} 2", torch.float64, **options)


def _check_channels(call: Call) -> None:
    """The channels from `first` on are inside of the buffer."""
    channels = call["x"].shape[1] if "channels" not in call.values else call["channels"]
    width = call["buffer"].shape[1]
    if call["first"] + channels > width:
        call.fail(ValueError, "first", f"leave room for {channels} of {width} channels", call["first"])


_APPENDED: Rows = {
    "buffer": activation("N D H W"),
    "x": activation("N K<=D H W"),
    "first": Integer(0),
    "moments": _per_channel("D"),
}


@op("dense_block", _APPENDED, writes=("buffer", "moments"), relations=_check_channels)
def dense_append_(buffer: Tensor, x: Tensor, first: int, moments: Tensor | None, *, backend: str) -> None:
    """Write x into the buffer's channels from `first` on.

    Args:
        moments: (D, 2) float64; the rows of these channels get the mean, and Σ(x − mean)². None: they are not needed.
    """


@op(
    "bn_statistics",
    {"dtype": ActivationDtype(), "rows": Integer(2, 2**62), "moments": _per_channel("C"), **norm("C")},
    writes=RUNNING,
    relations=check_momentum,
)
def bn_from_moments(moments: Tensor, rows: int, norm: Norm, dtype: torch.dtype, *, backend: str) -> Tensor:
    """bn_statistics of activations of this dtype, from the moments (C, 2) of their channels over `rows` pixels."""
    return moments.new_empty((4, moments.shape[0]), dtype=arithmetic_dtype(dtype))


@op("dense_block", {"buffer": activation("N D H W"), "state": wide("4 C<=D")})
def dense_bn_relu(buffer: Tensor, state: Tensor, *, backend: str) -> Tensor:
    """relu(scale·x + shift) of the buffer's first C channels, for a state (4, C). NaN passes the ReLU as in torch."""
    n, _, h, w = buffer.shape
    return empty_activation((n, state.shape[1], h, w), buffer)


@op(
    "dense_block",
    {
        "buffer": activation("N D H W"),
        "buffer_state": wide("4 C<=D"),
        "grad": activation("N C H W"),
        "grad_x": activation("N D H W"),
        "corrections": _per_channel("D"),
    },
    writes=("grad_x", "corrections"),
)
def dense_bn_relu_backward_(
    grad: Tensor, buffer: BnBranch, grad_x: Tensor, corrections: Tensor, *, backend: str
) -> Tensor:
    """Add the gradient of dense_bn_relu's input to that of the buffer, but for what is linear in the sums.

    With d = grad where the ReLU is open, else 0, and x̂ = (x − mean)·invstd, over M pixels, in the first C channels:

        grad_x += scale·d        corrections += (scale·Σd/M, scale·invstd·Σd·x̂/M)

    The whole gradient is grad_x − corrections[0] − corrections[1]·(x − mean), also after several layers, as they share
    the channels' means: see dense_gradient. With constant statistics the corrections stay as they are.

    Args:
        buffer: as x of the branch, with the state (4, C) of the BatchNorm.
        grad_x: (N, D, H, W), updated in place.
        corrections: (D, 2) float64, updated in place.

    Returns:
        sums (2, C): Σd (the bias's gradient), Σd·x̂ (the weight's).
    """
    return buffer.state.new_empty((2, buffer.state.shape[1]))


@op(
    "dense_block",
    {
        "buffer": activation("N D H W"),
        "grad_x": activation("N D H W"),
        "moments": _per_channel("D", given_with="corrections"),
        "corrections": _per_channel("D", given_with="moments"),
        "first": Integer(0),
        "channels": Integer(1),
    },
    relations=_check_channels,
)
def dense_gradient(
    buffer: Tensor,
    grad_x: Tensor,
    moments: Tensor | None,
    corrections: Tensor | None,
    first: int,
    channels: int,
    *,
    backend: str,
) -> Tensor:
    """grad_x − corrections[0] − corrections[1]·(x − mean) of some channels of the buffer: their whole gradient.

    Args:
        moments: (D, 2), of which the means are read; None, as the corrections: grad_x as it is.

    Returns:
        (N, channels, H, W): the channels from `first` on.
    """
    n, _, h, w = buffer.shape
    return empty_activation((n, channels, h, w), buffer)
