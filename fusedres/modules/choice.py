"""Choices between ways that give the same numbers, by shape alone: what was measured faster, or was asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedres.autograd import LIBRARY, UNIT_TENSORS, ConvBN, Directions

# The products of the Gram matrix with the weight do not shrink with the batch. Below this many rows an input channel
# they cost more than 5% of the block, and the output that they would spare is no larger than they are.
_MIN_ROWS_A_CHANNEL = 16

# Inference goes through the block some images at a time, so that its intermediates stay in cache and their memory is
# used again: on two cores, batch 8, a 256-channel Bottleneck at 56x56 took 0.6 of the time. Below _WHOLE_BYTES it lost.
_WHOLE_BYTES = 16 << 20
_PART_BYTES = 8 << 20


_OWN = Directions(True, True, True)


def own_products(conv: str, backend: str, convolution: Any) -> Directions:
    """Which products of a convolution run in this package's own kernels.

    The CPU's convolutions are always the library's, and so are grouped ones. "auto" takes the library's too: no GPU has
    measured the own ones yet.
    """
    return _OWN if conv == "fused" and backend != "cpu" and convolution.groups == 1 else LIBRARY


def one_pass_units(
    memory: str,
    units: list[ConvBN],
    projection: ConvBN | None,
    tensors: list[Tensor | None],
    shape: tuple[int, int, int, int],
) -> tuple[bool, bool]:
    """Whether the last unit and the projection take their statistics before the convolution (ops.one_pass).

    Only where memory="min" asks for it: on two cores, batch 8, a Bottleneck's training step took 0.95 to 1.08 of the
    ordinary time at 56x56 and 28x28, so "auto" leaves it.
    """
    if memory != "min":
        return False, False
    rows = shape[0] * shape[2] * shape[3]
    last = tensors[UNIT_TENSORS * (len(units) - 1)]
    assert last is not None
    of_projection = False
    if projection is not None:
        weight = tensors[UNIT_TENSORS * len(units)]
        assert weight is not None
        of_projection = _possible(projection, weight, rows)
    return _possible(units[-1], last, rows), of_projection


def _possible(unit: ConvBN, weight: Tensor, rows: int) -> bool:
    return unit.batch_statistics and unit.pixelwise and rows >= _MIN_ROWS_A_CHANNEL * weight.shape[1]


def images_at_a_time(x: Tensor, shape: tuple[int, int, int, int]) -> int:
    """How many images inference takes through the block together."""
    images = x.shape[0]
    size = max(x.numel(), shape[0] * shape[1] * shape[2] * shape[3]) * x.element_size()
    if not x.is_cpu or size < _WHOLE_BYTES:
        return images
    return max(1, images * _PART_BYTES // size)
