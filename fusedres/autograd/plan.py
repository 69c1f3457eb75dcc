"""What a residual block is made of: the constants of one call, and its tensors in one flat order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNIT_TENSORS = 6  # conv weight, BN weight, BN bias, running_mean, running_var, num_batches_tracked


class ConvBN(NamedTuple):
    """A convolution without bias and the BatchNorm behind it."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    batch_statistics: bool  # else the running ones, as constants
    update: bool  # running statistics take this batch in
    momentum: float | None
    eps: float

    @property
    def pointwise(self) -> bool:
        """No padding, dilation or groups: a 1x1 kernel makes it a matrix product of (subsampled) pixels."""
        return self.padding == (0, 0) and self.groups == 1 and self.stride[0] == self.stride[1]


class BlockPlan(NamedTuple):
    """The units of the residual branch in order, then the projection's if there is one."""

    units: tuple[ConvBN, ...]
    projection: ConvBN | None
    pad_stride: int  # stride of an identity or zero-padded shortcut
    one_pass: tuple[bool, bool]  # last unit, projection: statistics before the convolution
    dtype: torch.dtype  # of the convolutions: the autocast dtype, else the input's
    backend: str


class Unit(NamedTuple):
    """The tensors of a ConvBN."""

    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None


def units_of(tensors: tuple[Tensor | None, ...]) -> list[Unit]:
    """The flat order back into units."""
    return [Unit(*tensors[i : i + UNIT_TENSORS]) for i in range(0, len(tensors), UNIT_TENSORS)]  # type: ignore[arg-type]
