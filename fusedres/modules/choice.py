"""Where statistics before the convolution (ops.one_pass) are used: asked for with memory="min", or measured faster."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedres.autograd import ConvBN


def one_pass_pays(
    memory: str,
    units: list[ConvBN],
    projection: ConvBN | None,
    tensors: list[Tensor | None],
    x: Tensor,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
) -> tuple[bool, bool]:
    """Whether the last unit and the projection run one-pass.

    The products of the Gram matrix with the weight do not shrink with the batch: below `_MIN_ROWS_A_CHANNEL` rows an
    input channel they cost more than they save, and the raw output that they would spare is no larger than they are.
    """
    rows = shape[0] * shape[2] * shape[3]
    last = tensors[6 * (len(units) - 1)]
    assert last is not None
    choice = [_possible(units[-1], last, rows), False]
    if projection is not None:
        weight = tensors[6 * len(units)]
        assert weight is not None
        choice[1] = _possible(projection, weight, rows)
    if memory != "min":
        choice = [pays and _measured_faster(rows, x, dtype) for pays in choice]
    return choice[0], choice[1]


_MIN_ROWS_A_CHANNEL = 4


def _possible(unit: ConvBN, weight: Tensor, rows: int) -> bool:
    return unit.batch_statistics and unit.pixelwise and rows >= _MIN_ROWS_A_CHANNEL * weight.shape[1]


def _measured_faster(rows: int, x: Tensor, dtype: torch.dtype) -> bool:
    return False
