"""What the residual blocks that are made of steps share: their parts, and the check that both sides of the add fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from fusedres.errors import ShapeError
from fusedres.modules.norm_act_conv import Named
from fusedres.values import Geometry


class ComposedBlock(nn.Module):
    """A residual block with children conv1, bn1, conv2, …, activation and downsample, which each call reads."""

    depth: int  # of the branch, in convolutions
    downsample: nn.Module | None

    def __init__(self, activation: nn.Module | None, downsample: nn.Module | None) -> None:
        super().__init__()
        self.activation = nn.ReLU() if activation is None else activation
        self.downsample = downsample

    def convs(self) -> list[Named]:
        """Return the convolutions of the branch, with their names."""
        return [(name, getattr(self, name)) for name in (f"conv{index + 1}" for index in range(self.depth))]

    def norms(self) -> list[Named]:
        """Return the BatchNorms of the branch, with their names."""
        return [(name, getattr(self, name)) for name in (f"bn{index + 1}" for index in range(self.depth))]

    def check_shortcut(self, x: Any, projection: nn.Module | None) -> None:
        """Raise where the shortcut has another shape than the branch, before anything is computed.

        Args:
            projection: the convolution of the shortcut, if that is all that changes its shape.
        """
        convs: list[Any] = [conv for _, conv in self.convs()]
        fits = isinstance(x, Tensor) and x.dim() == 4 and all(map(_is_plain, convs))
        if not fits or x.shape[1] != convs[0].in_channels:
            return  # a step raises, or its modules do
        reached = start = _reached(tuple(x.shape), convs)
        if self.downsample is None:
            start = tuple(x.shape)
        elif _is_plain(projection):
            start = _reached(tuple(x.shape), [projection])
        if start != reached:
            raise ShapeError(
                f"{type(self).__name__}: the shortcut must have shape {reached} like the residual branch, got {start}; "
                "give the block a downsample (a 1x1 convolution, or ZeroPadShortcut) that reaches it"
            )


def _is_plain(conv: nn.Module | None) -> bool:
    return type(conv) is nn.Conv2d and not isinstance(conv.padding, str)


def _reached(shape: tuple[int, ...], convs: Sequence[Any]) -> tuple[int, ...]:
    """Return the shape of the result of convolutions of an input of this shape."""
    for conv in convs:
        geometry = Geometry(_pair(conv.stride), _pair(conv.padding), _pair(conv.dilation))
        shape = geometry.output_shape(shape, conv.weight.shape)
    return shape
