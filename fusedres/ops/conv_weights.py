"""Convolution weights as the kernels read them: in the activations' dtype, channels innermost."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.ops._arguments import ActivationDtype, Items, strided
from fusedres.ops._library import op


@op("conv_weights", {"dtype": ActivationDtype(), "weights": Items(strided("K C R S", "floating"), most=4)})
def conv_weights(weights: list[Tensor], dtype: torch.dtype, *, backend: str) -> list[Tensor]:
    """One to four weights converted to `dtype` and laid out densely as (K, R, S, C), all of them in one launch.

    Returns:
        One fresh channels_last tensor for each weight, never an alias of it.
    """
    return [torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last) for weight in weights]
