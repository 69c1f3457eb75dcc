"""The ops of fusedres.ops.one_pass in Triton."""

from __future__ import annotations

from torch import Tensor

from fusedres.kernels.one_pass.products import one_pass_products
from fusedres.kernels.one_pass.statistics import one_pass_fold, one_pass_statistics
from fusedres.kernels.one_pass_tail.dgrad import one_pass_dgrad
from fusedres.kernels.one_pass_tail.reduce import one_pass_reduce
from fusedres.values import Centred, Gated, GramState, pixel_rows

__all__ = ["one_pass_backward", "one_pass_statistics"]


def one_pass_backward(
    d: Tensor, sum_d: Tensor, z: Tensor, conv_weight: Tensor, gram_state: GramState, with_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See fusedres.ops.one_pass; use the kernels of the tail's backward, without a gate and a state for z."""
    state, _, total = gram_state
    count = pixel_rows(z)
    gated, centred = Gated(d, None), Centred(z, state.new_zeros(z.shape[1]))
    folded, _ = one_pass_fold(conv_weight, state, total, count, z.dtype)
    cross, _, _ = one_pass_reduce(gated, centred, None)
    grad_conv, grad_weight, quadratic, constant = one_pass_products(
        cross, sum_d, conv_weight, folded, gram_state, count, z.dtype
    )
    if with_input:
        grad_z, _ = one_pass_dgrad(gated, centred, None, folded, quadratic, constant, False)
    else:
        grad_z = z.new_empty(0)
    return grad_z, grad_conv, grad_weight
