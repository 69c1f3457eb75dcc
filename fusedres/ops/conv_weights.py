"""Convolution weights as the kernels read them: in the activations' dtype, channels innermost."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops import _checks
from fusedres.ops._library import Op

_MOST = 4


def _check_conv_weights(weights: list[Tensor], dtype: torch.dtype, backend: str) -> None:
    op = "conv_weights"
    if not 1 <= len(weights) <= _MOST:
        raise ValueError(f"{op}: weights must be 1 to {_MOST} tensors, got {len(weights)}")
    if dtype not in _checks.FLOATING:
        raise TypeError(f"{op}: dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    for i, weight in enumerate(weights):
        if weight.dim() != 4:
            raise ValueError(f"{op}: weights[{i}] must have 4 dimensions (K, C, R, S), got {tuple(weight.shape)}")
        if weight.dtype not in _checks.FLOATING:
            raise TypeError(f"{op}: weights[{i}] must be float32, float64, bfloat16 or float16, got {weight.dtype}")
        if weight.device != weights[0].device:
            expected = f"be on {weights[0].device} like weights[0]"
            raise RuntimeError(f"{op}: weights[{i}] must {expected}, got {weight.device}; move one of them")


def _fake(weights: list[Tensor], dtype: torch.dtype, backend: str) -> list[Tensor]:
    return [torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last) for weight in weights]


CONV_WEIGHTS = Op(
    "conv_weights(Tensor[] weights, ScalarType dtype, str backend) -> Tensor[]",
    "conv_weights",
    _check_conv_weights,
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
