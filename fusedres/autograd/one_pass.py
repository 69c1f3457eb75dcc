"""The steps of one-pass units (ops.one_pass), which know their BatchNorm's statistics before their convolution runs.

With the library's convolutions the centred input z' is written out and convolved (`convolve_centred`), and backward
computes it again. With this package's own, BatchNorm is folded into the weight (`fold`), and the whole tail of the
block is one product, which centres its input where it loads it.
"""

from __future__ import annotations

from torch import Tensor

from fusedres.autograd.convolution import convolution
from fusedres.autograd.plan import Branch, ConvBN, OnePass
from fusedres.autograd.synchronised import one_pass_state
from fusedres.ops.launch import Launches, launches
from fusedres.values import Centred, Folded, Gated, Gram, GramState, Norm, Raw, pixel_rows


def convolve_centred(h: Raw, unit: ConvBN, weight: Tensor, norm: Norm, backend: str) -> tuple[Branch, Tensor]:
    """Return the end of a branch, and the raw convolution of the centred input as one that stands alone."""
    launch = launches(backend)
    z, *sums = launch.gram(h.y, h.state, unit.stride[0])
    gram = Gram(*sums)
    if unit.group is None:
        state, projected = launch.one_pass_statistics(weight, gram, pixel_rows(z), norm)
    else:
        state, projected = one_pass_state(gram, pixel_rows(z), unit, weight, norm, launch)
    y = convolution(z, weight, unit, backend, subsampled=True)
    return Branch(None, state, OnePass(gram.pivot, gram.total, projected)), y


def fold(h: Raw, unit: ConvBN, weight: Tensor, norm: Norm, launch: Launches) -> tuple[Branch, Folded]:
    """Return the end of a branch, and its product with BatchNorm folded in, which the tail runs."""
    stride = unit.stride[0]
    gram = Gram(*launch.gram_statistics(h.y, h.state, stride))
    count = pixel_rows(h.y, stride)
    state, projected = launch.one_pass_statistics(weight, gram, count, norm)
    folded, offset = launch.one_pass_fold(weight, state, gram.total, count, h.y.dtype)
    return Branch(None, state, OnePass(gram.pivot, gram.total, projected, folded)), Folded(folded, offset)


def centred(z: Tensor, branch: Branch, stride: int = 1) -> Centred:
    """Return the input of a one-pass unit as its product takes it."""
    assert branch.one_pass is not None
    return Centred(z, branch.one_pass.pivot, stride)


def backward_stored(
    d: Tensor, sum_d: Tensor, h: Raw, weight: Tensor, branch: Branch, stride: int, needs_input: bool, launch: Launches
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return gradients if the library convolves: of relu(BN(h)) if needed, of the conv and of BatchNorm's weight."""
    one, state = _saved(branch)
    z = launch.bn_relu(h.y, h.state, one.pivot, stride)
    grad_z, grad_conv, grad_norm = launch.one_pass_backward(d, sum_d, z, weight, state, needs_input)
    return grad_z if needs_input else None, grad_conv, grad_norm


def backward_product(
    gated: Gated, z: Centred, z_state: Tensor | None, sums: tuple[Tensor, Tensor], weight: Tensor, branch: Branch,
    needs_input: bool, launch: Launches,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor, Tensor]:  # fmt: skip
    """Return gradients if the tail was one product, from the sums dᵀz' and Σd; see backward_stored.

    The input's gradient has passed the ReLU of z_state, and comes with the sums that the BatchNorm before it needs.
    """
    one, state = _saved(branch)
    count = pixel_rows(z.z, z.stride)
    grad_conv, grad_norm, quadratic, constant = launch.one_pass_products(
        *sums, weight, one.folded, state, count, z.z.dtype
    )
    if not needs_input:
        return None, grad_conv, grad_norm
    masked = z_state is not None
    grad_z, partials = launch.one_pass_dgrad(gated, z, z_state, one.folded, quadratic, constant, masked)
    return (grad_z, partials), grad_conv, grad_norm


def _saved(branch: Branch) -> tuple[OnePass, GramState]:
    one = branch.one_pass
    assert one is not None
    return one, GramState(branch.state, one.projected, one.total)
