"""The values that passes, ops and kernels hand to each other: named tuples of tensors and numbers.

Each field is described here, once. An op takes these values as its parameters; `fusedres/ops/_library.py` flattens them
into the arguments of the op's torch.library schema. An activation is a dense channels_last tensor (N, C, H, W), and a
state is the (4, C) tensor of a BatchNorm: mean, invstd, scale, shift, with BatchNorm(x) = scale·x + shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """How a convolution moves over its input: two integers each, for the rows and for the columns."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]

    def output_size(self, axis: int, size: int, kernel: int) -> int:
        """Pixels of the output along one axis (0: rows, 1: columns); 0 or less where the kernel does not fit."""
        covered = self.dilation[axis] * (kernel - 1) + 1
        return (size + 2 * self.padding[axis] - covered) // self.stride[axis] + 1

    def output_shape(self, x: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int, int]:
        """(N, K, P, Q) of the convolution of an input (N, C, H, W) with a weight (K, C, R, S)."""
        return x[0], weight[0], self.output_size(0, x[2], weight[2]), self.output_size(1, x[3], weight[3])


DENSE = Geometry((1, 1), (0, 0), (1, 1))


class Norm(NamedTuple):
    """What a BatchNorm module holds. Vectors are (C,), each in a floating dtype of its own."""

    weight: Tensor | None  # None: 1
    bias: Tensor | None  # None: 0
    running_mean: Tensor | None  # None, as running_var: there are no running statistics to update
    running_var: Tensor | None
    num_batches_tracked: Tensor | None  # () int64, the number of batches in the running statistics
    momentum: float | None  # weight of the new batch in the running statistics; None: 1 / num_batches_tracked
    eps: float  # is added to the variance


class Raw(NamedTuple):
    """A raw convolution output y, to be read as relu(scale·y + shift) with a state, as it is without one."""

    y: Tensor
    state: Tensor | None


class ShortcutInput(NamedTuple):
    """What is added to the residual branch.

    It is x; or BatchNorm(x), with the state of a projection's BatchNorm; or every stride-th pixel of x, with zeros in
    the channels that x lacks (option A of He et al. 2015).
    """

    x: Tensor
    state: Tensor | None = None
    stride: int = 1


class Gated(NamedTuple):
    """A gradient after a ReLU, and where that ReLU is open: d = grad where the gate is open, else 0.

    The gate is the ReLU's output (closed where it is <= 0, so NaN is open); or its packed bits (N, H, W, ceil(C / 8))
    in uint8, where channel 8k + j is bit j of byte k; or None, if grad is masked already.
    """

    grad: Tensor
    gate: Tensor | None


class Gradient(NamedTuple):
    """The gradient dy of a convolution's output: grad itself, or to be formed from the gradient after its BatchNorm.

    With y, dy = a·(d − c1 − (y − mean)·k), rounded to grad's dtype, with d as in Gated and the four rows a, c1, mean, k
    of `coefficients` (4, C) from ops.bn_backward_coefficients.
    """

    grad: Tensor
    gate: Tensor | None = None
    y: Tensor | None = None
    coefficients: Tensor | None = None


class ShortcutGradient(NamedTuple):
    """What a shortcut adds to the gradient of its input: d, as in Gated, at every stride-th pixel."""

    grad: Tensor
    gate: Tensor | None
    stride: int = 1


class BnBranch(NamedTuple):
    """The input x of a BatchNorm, its state, and whether the statistics in that state depend on x."""

    x: Tensor
    state: Tensor
    batch_statistics: bool


class NormState(NamedTuple):
    """The state of a BatchNorm, and whether its statistics depend on the batch."""

    state: Tensor
    batch_statistics: bool


class BnGradient(NamedTuple):
    """What the gradient of a BatchNorm's input is formed from, besides that of its output; see Gradient."""

    y: Tensor
    coefficients: Tensor


class Pooled(NamedTuple):
    """The gradient of a max-pool's output, and where in its 3x3 window each maximum was (ops.bn_relu_maxpool)."""

    grad: Tensor
    argmax: Tensor


class Gram(NamedTuple):
    """Pivot t (C,), column sums Σ(z − t) (C,) and Gram matrix Σ(z − t)(z − t)ᵀ (C, C) of an activation z (ops.gram)."""

    pivot: Tensor
    total: Tensor
    gram: Tensor


class GramState(NamedTuple):
    """The state of the BatchNorm after a 1x1 convolution, derived from the Gram matrix of the convolution's input.

    `state` (4, K) is that of the convolution of z − t; `projected` is W·Cov (K, C); `total` is that of Gram.
    """

    state: Tensor
    projected: Tensor
    total: Tensor


class Centred(NamedTuple):
    """The input of a one-pass product: z − pivot at every stride-th pixel, rounded to z's dtype."""

    z: Tensor
    pivot: Tensor
    stride: int = 1


class Folded(NamedTuple):
    """A 1x1 convolution with its BatchNorm folded in: weight W̃ (K, C) and constant b (K,) of ops.one_pass_fold."""

    folded: Tensor
    offset: Tensor


class Packed(NamedTuple):
    """A convolution with its BatchNorm folded in, for inference.

    `panels` is the weight as ops.pack_weight lays it out, for Winograd's algorithm if `winograd`; `bias` is (K,), and
    `kernel` is (R, S).
    """

    panels: Tensor
    bias: Tensor
    kernel: Sequence[int]
    winograd: bool = False


class Activation(NamedTuple):
    """An activation of a residual tail: of the sum, or of the branch before the add.

    `kind` is one of ACTIVATIONS. "leaky_relu" is z where z > 0, else slope·z, with `slope` (C,) in the arithmetic type:
    LeakyReLU and PReLU. "gelu" is the exact one.
    """

    kind: str = "identity"
    slope: Tensor | None = None
    before_add: bool = False


ACTIVATIONS = ("identity", "relu", "leaky_relu", "silu", "hardswish", "gelu")


class TailTerm(NamedTuple):
    """A term of a residual tail: factor ⊙ σ(logits) ⊙ x, with BatchNorm(x) for x if there is a state.

    `factor` is (1, C), or (N, C) with a row for each sample, in the arithmetic type; `logits` are like x. At most one
    of the two is given; None is 1.
    """

    x: Tensor
    state: Tensor | None = None
    factor: Tensor | None = None
    logits: Tensor | None = None


class TailCoefficients(NamedTuple):
    """The coefficients a, c1, μ, k (1 or N, 4, C) of the BatchNorms of a tail's terms, see Gradient; None: no norm."""

    branch_coefficients: Tensor | None
    shortcut_coefficients: Tensor | None


class TailNeeds(NamedTuple):
    """Which gradients of a residual tail are to be written."""

    needs_branch: bool
    needs_shortcut: bool
    needs_logits: bool

    def written(self, branch: TailTerm, shortcut: TailTerm | None) -> tuple[bool, bool, bool, bool]:
        """Return whether the gradients of the branch's x and logits, and of the shortcut's, are written."""
        shortcut_logits = None if shortcut is None else shortcut.logits
        of_branch = (self.needs_branch, self.needs_logits and branch.logits is not None)
        return (*of_branch, self.needs_shortcut, self.needs_logits and shortcut_logits is not None)


TAIL_SUMS = 6  # rows of the sums of ops.gated_tail_reduce


def tail_groups(branch: TailTerm, shortcut: TailTerm | None) -> int:
    """Return how many groups of rows of a residual tail have factors of their own: 1, or one for each sample."""
    factors = (branch.factor, None if shortcut is None else shortcut.factor)
    return max(1, *(1 if factor is None else factor.shape[0] for factor in factors))


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that values of this dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor converted to the dtype, or itself if it has that dtype."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def pixel_rows(x: Tensor, stride: int = 1) -> int:
    """Return how many pixels the images of a batch have when every stride-th row and column is taken."""
    return x.shape[0] * subsampled(x.shape[2], stride) * subsampled(x.shape[3], stride)


def subsampled(size: int, stride: int) -> int:
    """Return how many pixels are left of `size` when every stride-th is taken."""
    return (size + stride - 1) // stride


def mask_shape(x: Tensor) -> tuple[int, int, int, int]:
    """Return the shape of the packed bits of an activation (N, C, H, W), (N, H, W, ceil(C / 8)): see Gated."""
    n, c, h, w = x.shape
    return n, h, w, (c + 7) // 8
