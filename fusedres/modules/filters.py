"""Blocks with filters: modules before a convolution that run as they are.

Examples are the BlurPool of an anti-aliased ResNet, and the average pool before the projection of a ResNet-D. A filter
in the branch divides it into parts; each part is fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedres.modules.anatomy import Anatomy


class Part(NamedTuple):
    """Units of the branch without a filter between them, and the filters before the first."""

    filters: tuple[nn.Module, ...]
    anatomy: Anatomy


def split(anatomy: Anatomy) -> list[Part]:
    """Return the parts of a block; the last one has the shortcut."""
    if not anatomy.filters:
        return [Part((), anatomy)]
    starts = [index for index in range(len(anatomy.units)) if index == 0 or anatomy.filters[index]]
    parts: list[Part] = []
    for start, end in zip(starts, [*starts[1:], len(anatomy.units)], strict=True):
        part = Anatomy(anatomy.units[start:end], chained=True)
        if end == len(anatomy.units):
            part = anatomy._replace(units=part.units, filters=())
        parts.append(Part(anatomy.filters[start], part))
    return parts


def filtered(filters: Sequence[nn.Module], h: Tensor) -> Tensor:
    """Run filters one after the other."""
    for module in filters:
        h = module(h)
    return h


def filtered_like(filters: Sequence[nn.Module], h: Tensor) -> Tensor:
    """Return a tensor of one element, expanded to the shape that filters would return; they compute nothing."""
    if not filters:
        return h
    with FakeTensorMode(allow_non_fake_inputs=True):
        shape = filtered(filters, torch.empty(h.shape, dtype=h.dtype, device=h.device)).shape
    return h.new_empty(1).expand(shape)
