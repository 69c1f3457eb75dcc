"""Convolution weights as the kernels read them: in the activations' dtype, channels innermost."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import ActivationDtype, Items, strided
from fusedres.ops._library import Op


def _fake(weights: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last) for weight in weights]


CONV_WEIGHTS = Op(
    "conv_weights(Tensor[] weights, ScalarType dtype, str backend) -> Tensor[]",
    "conv_weights",
    {"dtype": ActivationDtype(), "weights": Items(strided("K C R S", "floating"), most=4)},
    _fake,
)


def conv_weights(weights: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Every weight converted to `dtype` and laid out densely as (K, R, S, C), all of them in one launch.

    Args:
        weights: 1 to 4 tensors (K, C, R, S) of any strides; float32, float64, bfloat16 or float16 each.
        dtype: of the results.
        backend: "reference" or "triton".

    Returns:
        One fresh channels_last tensor a weight, never an alias of it.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong number or shape, dtype, or device.
    """
    converted: list[Tensor] = CONV_WEIGHTS(weights, dtype, backend)
    return converted
