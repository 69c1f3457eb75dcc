"""The constants of one call of a residual block, and its tensors in one flat order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fusedres.dispatch import LIBRARY, Directions
from fusedres.values import Geometry, Norm

UNIT_TENSORS = 6  # conv weight, BN weight, BN bias, running_mean, running_var, num_batches_tracked
UNIT_PARAMS = 3  # the first of them

Tensors = tuple[Tensor | None, ...]  # UNIT_TENSORS of every unit, one after the other


class ConvBN(NamedTuple):
    """A convolution without bias and the BatchNorm after it."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    pixelwise: bool  # a 1x1 kernel without padding or groups, same stride both ways: reads every stride-th pixel
    batch_statistics: bool  # else the running ones, as constants
    update: bool  # update the running statistics with this batch
    momentum: float | None
    eps: float
    own: Directions = LIBRARY
    group: Any = None  # the processes whose batches the statistics are of (torch.distributed); None: this one alone

    @property
    def geometry(self) -> Geometry:
        """How the convolution moves over its input."""
        return Geometry(self.stride, self.padding, self.dilation)

    @property
    def subsamples(self) -> bool:
        """Whether the convolution is a dense 1x1 convolution of every stride-th pixel."""
        return self.pixelwise and self.stride != (1, 1)

    def output_shape(self, shape: Sequence[int], weight: Sequence[int]) -> tuple[int, int, int, int]:
        """Shape of the convolution of an input of this shape with a weight of that shape."""
        return self.geometry.output_shape(shape, weight)


class Inputs(NamedTuple):
    """What a block reads: x, and what its shortcut reads if it is not x."""

    x: Tensor
    other: Tensor | None = None

    @property
    def shortcut(self) -> Tensor:
        """What the shortcut reads."""
        return self.x if self.other is None else self.other


class BlockPlan(NamedTuple):
    """The units of the residual branch in order, then the projection's if there is one."""

    units: tuple[ConvBN, ...]
    projection: ConvBN | None
    pad_stride: int  # stride of an identity or zero-padded shortcut
    one_pass: tuple[bool, bool]  # last unit, projection: statistics before the convolution
    recompute: tuple[bool, bool]  # the same two: their convolution runs again in backward, and its output is not saved
    infer_images: int  # images that inference takes through the whole block at a time
    dtype: torch.dtype  # of the convolutions: the autocast dtype, else the input's
    backend: str
    channels_last: bool = False  # the result's memory format, else contiguous NCHW
    checked: bool = True  # False: only the C++ passes may run, as they check the tensors' memory themselves
    # What the shortcut reads: the block's x, or another tensor. "none": there is no shortcut, and out = relu(F(x)).
    reads: Literal["x", "other", "none"] = "x"
    in_cpp: bool = True  # the C++ passes know plans of this kind: the shortcut reads x, no unit has a group

    @property
    def all_units(self) -> tuple[ConvBN, ...]:
        """The branch's units, then the projection's."""
        return self.units if self.projection is None else (*self.units, self.projection)

    @property
    def synchronised(self) -> bool:
        """Some unit's statistics are those of several processes."""
        return any(unit.group is not None for unit in self.all_units)

    @property
    def own_convolutions(self) -> bool:
        """Some convolution runs in a kernel of this package, with BatchNorm on its load or store."""
        return any(any(unit.own) for unit in self.all_units)

    def is_one_pass(self, index: int) -> bool:
        """Whether a unit computes its statistics before its convolution runs."""
        last = len(self.units) - 1
        return index >= last and self.one_pass[index - last]

    def recomputes(self, index: int) -> bool:
        """Whether a unit's convolution runs again in backward."""
        last = len(self.units) - 1
        return index >= last and self.recompute[index - last]


class StemPlan(NamedTuple):
    """The constants of one call of a stem."""

    unit: ConvBN
    dtype: torch.dtype  # of the convolution: the autocast dtype, else the input's
    backend: str
    channels_last: bool = False  # the result's memory format, else contiguous NCHW


def norm_of(tensors: Tensors, index: int, unit: ConvBN) -> Norm:
    """A unit's BatchNorm, with the running statistics that a call reads or updates."""
    _, weight, bias, mean, var, batches = tensors[index * UNIT_TENSORS : (index + 1) * UNIT_TENSORS]
    if not unit.batch_statistics:
        batches = None
    elif not unit.update:
        mean = var = batches = None
    return Norm(weight, bias, mean, var, batches, unit.momentum, unit.eps)


class OnePass(NamedTuple):
    """What a one-pass unit (ops.one_pass) saves instead of its convolution's output."""

    pivot: Tensor
    total: Tensor
    projected: Tensor
    folded: Tensor | None = None  # the weight with BatchNorm's scale in it, where the tail was one product


class Branch(NamedTuple):
    """The end of a branch: the raw convolution output (None if it is not saved), its state, its one-pass tensors."""

    y: Tensor | None
    state: Tensor
    one_pass: OnePass | None = None


class Saved(NamedTuple):
    """What backward needs besides x and the parameters."""

    ys: Sequence[Tensor]  # raw convolution outputs of the units before the last
    states: Sequence[Tensor]  # their (4, C) states
    last: Branch
    projection: Branch | None
    mask: Tensor | None  # packed bits of the last ReLU; None: without a shortcut, it is computed again from the last y
    weights: Sequence[Tensor | None] = ()  # of all units, as own kernels take them; None: the parameter itself

    def flat(self) -> list[Tensor | None]:
        """The mask, then every unit's y and every unit's state, then what only some blocks save."""
        ends = [self.last] if self.projection is None else [self.last, self.projection]
        found = [self.mask, *self.ys, *(end.y for end in ends), *self.states, *(end.state for end in ends)]
        for end in ends:
            found += end.one_pass or (None,) * len(OnePass._fields)
        return [*found, *self.weights]

    @staticmethod
    def of(flat: Sequence[Tensor | None], plan: BlockPlan) -> Saved:
        """The inverse of flat; after passes in C++ there is only the first part."""
        inner, depth = len(plan.units) - 1, len(plan.all_units)
        mask, ys, states, rest = flat[0], flat[1 : 1 + depth], flat[1 + depth : 1 + 2 * depth], flat[1 + 2 * depth :]
        ends: list[Branch] = []
        for i in range(inner, depth):
            one_pass, rest = rest[: len(OnePass._fields)], rest[len(OnePass._fields) :]
            pivot, total, projected, folded = one_pass or (None,) * len(OnePass._fields)
            state = states[i]
            assert state is not None
            if pivot is None or total is None or projected is None:
                ends.append(Branch(ys[i], state))
            else:
                ends.append(Branch(None, state, OnePass(pivot, total, projected, folded)))
        projection = None if plan.projection is None else ends[1]
        return Saved(_present(ys[:inner]), _present(states[:inner]), ends[0], projection, mask, rest)


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
