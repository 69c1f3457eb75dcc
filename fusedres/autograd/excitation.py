"""The excitation of a residual tail: factors for each sample and channel, made of the means of the normalised branch.

    p = mean over the pixels of BN(y) = scale·mean(y) + shift        s = σ(W2·relu(W1·p + b1) + b2)

mean(y) is found with BatchNorm's statistics, in one pass over y; p and s are (N, C), and BN(y) is not written. Source:
Hu et al. 2018, Squeeze-and-Excitation Networks, https://arxiv.org/abs/1709.01507.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

EXCITATION_TENSORS = 4  # W1 (R, C), b1 (R,), W2 (C, R), b2 (C,); the matrices may have two more axes of length 1


def normalised(means: Tensor, state: Tensor) -> Tensor:
    """Return p."""
    return means * state[2] + state[3]


def excite(p: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Return s (N, C) in the dtype of p; dtype: of the products."""
    first, first_bias, second, second_bias = (None if tensor is None else tensor.to(dtype) for tensor in tensors)
    assert first is not None and second is not None
    with torch.autocast(p.device.type, enabled=False):
        hidden = F.relu(F.linear(p.to(dtype), first.flatten(1), first_bias))
        return F.linear(hidden, second.flatten(1), second_bias).sigmoid().to(p.dtype)


def excitation_gradients(
    p: Tensor, tensors: Sequence[Tensor | None], dtype: torch.dtype, grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradient of p, and of the tensors where they are needed, from that of s."""
    with torch.enable_grad():
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in (p, *tensors)]
        assert leaves[0] is not None
        s = excite(leaves[0], leaves[1:], dtype)
    wanted = [leaf for leaf, need in zip(leaves, (True, *needs), strict=True) if need and leaf is not None]
    grad_p, *found = torch.autograd.grad(s, wanted, grad.to(s.dtype))
    others = iter(found)
    return grad_p, [next(others) if need else None for need in needs]
