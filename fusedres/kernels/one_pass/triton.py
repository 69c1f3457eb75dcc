"""The ops of fusedres.ops.one_pass in Triton."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.one_pass.products import one_pass_products
from fusedres.kernels.one_pass.statistics import one_pass_fold, one_pass_statistics
from fusedres.kernels.one_pass_tail.dgrad import one_pass_dgrad
from fusedres.kernels.one_pass_tail.reduce import one_pass_reduce

__all__ = ["one_pass_backward", "one_pass_statistics"]


def one_pass_backward(
    d: Tensor,
    sum_d: Tensor,
    z: Tensor,
    conv_weight: Tensor,
    state: Tensor,
    projected: Tensor,
    total: Tensor,
    with_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass: the kernels of the tail's backward, which read d and z as they are."""
    n, in_channels, h, w = z.shape
    count = n * h * w
    centre = state.new_zeros(in_channels)  # z is centred
    folded, _ = one_pass_fold(conv_weight, state, total, count, z.dtype)
    cross, _, _ = one_pass_reduce(d, None, z, None, centre, 1, None, None, 1)
    grad_conv, grad_weight, quadratic, constant = one_pass_products(
        cross, sum_d, conv_weight, folded, state, projected, total, count, z.dtype
    )
    if with_input:
        grad_z, _ = one_pass_dgrad(d, None, z, None, centre, folded, quadratic, constant, 1, False)
    else:
        grad_z = z.new_empty(0)
    return grad_z, grad_conv, grad_weight
