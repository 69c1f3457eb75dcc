"""Random fully connected networks at initialisation, many at once, and how their gradients at two inputs correlate.

A plain layer is h ← relu(norm(W·h)); a residual one is h ← h + β·W·relu(norm(h)). Weights are normal with variance
2 / width (He); the first layer of a network of one number x is w·x + b with unit-normal w and b. The norm is over the
inputs, unit by unit: "none", "centring" (the mean is subtracted) or "BatchNorm". Its statistics are constants in the
gradient.

Source: Balduzzi et al. 2017, The Shattered Gradients Problem, https://arxiv.org/abs/1702.08591.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

WIDTH = 200
_RANGE = 2.0  # x is in [−2, 2]


class Design(NamedTuple):
    """A kind of network; weights: "He", or "default" for those, and the biases, that nn.Linear begins with."""

    norm: str
    beta: float | None = None  # None: plain
    weights: str = "He"


class _Random:
    """Random numbers for several networks at once, each from a seed of its own."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._generators])

    def layer(self, design: Design, width: int) -> tuple[Tensor, Tensor | None]:
        """Return weights (networks, width, width) and biases (networks, width, 1) of a layer."""
        if design.weights == "He":
            return self.normal(width, width) * math.sqrt(2 / width), None
        bound = 1 / math.sqrt(width)
        drawn = [torch.rand((width, width + 1), generator=generator) for generator in self._generators]
        uniform = bound * (2 * torch.stack(drawn) - 1)
        return uniform[..., :width], uniform[..., width:]


def derivatives(
    design: Design, depths: Sequence[int], points: int, seeds: Sequence[int], width: int = WIDTH
) -> dict[int, Tensor]:
    """Return dy/dx (networks, points) at points in [−2, 2] for each depth; y is a random sum of the last layer.

    A residual network ends with norm and ReLU.
    """
    random = _Random(seeds)
    x = torch.linspace(-_RANGE, _RANGE, points)
    weight, bias = random.normal(width, 1), random.normal(width, 1)
    h, slope = weight * x + bias, weight.expand(-1, -1, points)
    found = {}
    for depth in range(1, max(depths) + 1):
        layer, biases = random.layer(design, width)
        if design.beta is None:
            h, slope = (layer @ torch.cat([h, slope], -1)).split(points, -1)
            h, slope = _relu(*_normed(h if biases is None else h + biases, slope, design.norm))
        else:
            added = layer @ torch.cat(_relu(*_normed(h, slope, design.norm)), -1)
            h, slope = h + design.beta * added[..., :points], slope + design.beta * added[..., points:]
        if depth in depths:
            last = slope if design.beta is None else _relu(*_normed(h, slope, design.norm))[1]
            found[depth] = (random.normal(1, width) @ last)[:, 0]
    return found


def correlation(
    design: Design, depths: Sequence[int], seeds: Sequence[int], inputs: int = 256, width: int = WIDTH
) -> dict[int, Tensor]:
    """Return for each depth and network the mean correlation of the gradients of two of the inputs.

    The inputs are normal, of `width` features; the gradient is that of a random sum of the last layer.
    """
    random = _Random(seeds)
    h = random.normal(width, inputs)
    layers: list[tuple[Tensor, Tensor]] = []
    found = {}
    one = torch.ones(())
    for depth in range(1, max(depths) + 1):
        layer, _ = random.layer(design, width)
        if design.beta is None:
            h, slope = _relu(*_normed(layer @ h, one, design.norm))
        else:
            active, slope = _relu(*_normed(h, one, design.norm))
            h = h + design.beta * (layer @ active)
        layers.append((layer.mT, slope))
        if depth in depths:
            grad = random.normal(width, 1)
            for transposed, slopes in reversed(layers):
                if design.beta is None:
                    grad = transposed @ (slopes * grad)
                else:
                    grad = grad + design.beta * slopes * (transposed @ grad)
            units = grad / grad.norm(dim=1, keepdim=True)
            found[depth] = (units.sum(-1).square().sum(-1) - inputs) / (inputs * (inputs - 1))
    return found


def residual_theory(depth: int, beta: float) -> float:
    """Return the correlation of gradients through residual layers with BatchNorm, by mean-field reasoning.

    With v_l the variance that BatchNorm of layer l divides by, a branch multiplies the square of the gradient's norm by
    1 + β²/v_l, and the product of two inputs' gradients, which share half of their active units, by 1 + β²/(2·v_l).
    A branch adds (1 − 1/π)·β² to v about the mean of the inputs. (The paper counts β², which gives 1/√L.)
    """
    found = 1.0
    for layer in range(depth):
        variance = 1 + (1 - 1 / math.pi) * beta**2 * layer
        found *= (1 + beta**2 / (2 * variance)) / (1 + beta**2 / variance)
    return found


def _normed(h: Tensor, slope: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Return norm(h) over the inputs, and its derivative from that of h, with constant statistics."""
    if norm == "none":
        return h, slope
    h = h - h.mean(-1, keepdim=True)
    if norm == "centring":
        return h, slope
    scale = h.square().mean(-1, keepdim=True).rsqrt()
    return h * scale, slope * scale


def _relu(h: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    is_active = (h > 0).to(h.dtype)
    return h * is_active, slope * is_active
