"""BatchNorm of a 1x1 convolution from its input's Gram matrix: statistics before it runs, gradients without its output.

With z' = z − t the centred input (M×C), W the weight (K×C), s = Σz', G_z = z'ᵀz', Cov = G_z/M − (s/M)(s/M)ᵀ:

    mean' = W·s/M          var = diag(W·Cov·Wᵀ)

and with d the masked output gradient (M×K), G = dᵀz', a = scale, r = invstd, c1 = a·Σd/M, c2 = a·r·dγ/M:

    dγ = r·(rowsum(W⊙G) − mean'·Σd)
    dW = a⊙G − c1·sᵀ − c2⊙M·(W·Cov)
    dz = d·(a⊙W) − z'·Q + (s/M)ᵀQ − (Σd/M)ᵀ(a⊙W),  Q = Wᵀ·diag(c2)·W

BatchNorm with batch statistics does not change when z is shifted by t, so all of it holds for z' as for z; only
running_mean takes W·t back in. The convolution's own output is neither saved nor needed in backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import Call, Integer, activation, dense, norm, strided, wide
from fusedres.ops._library import op
from fusedres.ops.bn_statistics import RUNNING, check_momentum
from fusedres.values import Gram, GramState, Norm


def _check_count(call: Call) -> None:
    if call["count"] <= 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got {call['count']} rows")
    check_momentum(call)


@op(
    "one_pass",
    {
        "conv_weight": strided("K C 1 1", "floating"),
        "pivot": wide("C"),
        "total": dense("C", torch.float64),
        "gram": dense("C C", torch.float64),
        "count": Integer(0, 2**62),
        **norm("K"),
    },
    writes=RUNNING,
    relations=_check_count,
)
def one_pass_statistics(
    conv_weight: Tensor, gram: Gram, count: int, norm: Norm, *, backend: str
) -> tuple[Tensor, Tensor]:
    """State of the BatchNorm after a 1x1 convolution, from the Gram matrix of the convolution's input.

    The running statistics are updated in place, with those of the convolution of z, not of z'; after an error they are
    untouched.

    Args:
        conv_weight: (K, C, 1, 1), floating point.
        count: M, the number of rows in the Gram matrix; more than 1.

    Returns:
        state (4, K) for the convolution of z': mean', invstd, scale, shift; and W·Cov (K, C) for the backward.
    """
    channels, in_channels = conv_weight.shape[:2]
    return gram.pivot.new_empty((4, channels)), gram.pivot.new_empty((channels, in_channels))


@op(
    "one_pass",
    {
        "d": activation("N K H W", empty=False),
        "sum_d": wide("K"),
        "conv_weight": strided("K C 1 1", "floating"),
        "z": activation("N C H W"),
        "state": wide("4 K"),
        "projected": wide("K C"),
        "total": dense("C", torch.float64),
    },
)
def one_pass_backward(
    d: Tensor,
    sum_d: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    gram_state: GramState,
    with_input: bool = True,
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of BatchNorm(conv1x1(z)) with batch statistics, without the convolution's output.

    Args:
        d, sum_d: (N, K, H, W), the masked gradient, and its column sums (K,), of ops.relu_backward.
        z: (N, C, H, W), z' of ops.gram.
        conv_weight: (K, C, 1, 1).
        with_input: also make grad_z, which takes two of the three large products.

    Returns:
        grad_z like z, an empty tensor without with_input; the gradient of conv_weight; dγ (K,). dβ is sum_d.
    """
    grad_z = torch.empty_like(z, memory_format=torch.channels_last) if with_input else z.new_empty(0)
    return grad_z, torch.empty_like(conv_weight, memory_format=torch.contiguous_format), torch.empty_like(sum_d)
