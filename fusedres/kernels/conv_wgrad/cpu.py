"""The weight gradient of a convolution in C++ (csrc/conv_wgrad)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedres import _C
from fusedres.kernels.arguments import address, convolution_map, matrix_of, weight_map
from fusedres.values import Geometry, Gradient, Raw, arithmetic_dtype


def splits(grad: Sequence[int], input: Sequence[int], kernel: Sequence[int], geometry: Geometry) -> int:
    """Return how many sums conv_wgrad leaves for operands of these shapes."""
    found: int = _C.conv_wgrad_splits(convolution_map(input, (grad[1], input[1], *kernel), geometry))
    return found


def conv_wgrad(gradient: Gradient, input: Raw, kernel: Sequence[int], geometry: Geometry) -> Tensor:
    """See fusedres.ops.conv_wgrad."""
    grad, gate, y, coefficients = gradient
    h, input_state = input
    k, c = grad.shape[1], h.shape[1]
    parts = splits(grad.shape, h.shape, kernel, geometry)
    partials = grad.new_empty((parts, k, *kernel, c), dtype=arithmetic_dtype(grad.dtype))
    _C.conv_wgrad(
        (grad.data_ptr(), address(gate), address(y), address(coefficients)),
        matrix_of(h),
        address(input_state),
        convolution_map(h.shape, (k, c, *kernel), geometry),
        partials.data_ptr(),
        torch.get_num_threads(),
    )
    return partials


def conv_wgrad_finalize(partials: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """See fusedres.ops.conv_wgrad.conv_wgrad_finalize."""
    grads = [torch.empty_like(weight) for weight in weights]
    for partial, grad in zip(partials, grads, strict=True):
        _C.conv_wgrad_finalize(
            matrix_of(partial),
            partial.shape[0],
            matrix_of(grad),
            weight_map(grad.shape),
            grad.stride(),
            torch.get_num_threads(),
        )
    return grads
