"""Shattered gradients: in a deep plain network the gradients at neighbouring inputs are as unlike as white noise.

At initialisation, with inputs on a line, dy/dx of a plain network with BatchNorm loses its autocorrelation within some
twenty layers; that of a residual network loses it far more slowly. Over random inputs, the correlation of gradients of
two inputs falls like 2^−L through plain layers with BatchNorm, and like a power of L through residual ones.

The networks are those of random_networks.py, with BatchNorm's statistics held constant in the gradient. A plain network
of which nothing is centred does not shatter in the same way: centring makes half of the units active at each input.

Source: Balduzzi et al. 2017, The Shattered Gradients Problem, https://arxiv.org/abs/1702.08591.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusedres.analysis.blocks import copy_of
from fusedres.analysis.observing import check_images, logits_of, undisturbed
from fusedres.analysis.random_networks import Design, correlation, derivatives, residual_theory
from fusedres.analysis.results import COLOURS, AnalysisError, Result, style
from fusedres.analysis.sizes import FULL
from fusedres.analysis.training import set_statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LAGS = 15
POINTS = 256
_SHOWN = 4  # every so many points are in the picture of the covariance
_PLAIN_DEPTHS, _RESIDUAL_DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 5, 10, 20, 50)
_PLAIN, _RESIDUAL = Design("BatchNorm"), Design("BatchNorm", beta=1.0)
_SEEDS_AT_ONCE = 20
_POINTS_AT_ONCE = 64

# The networks of which the derivatives are taken, by name, with their depths.
NETWORKS: dict[str, tuple[Design, tuple[int, ...]]] = {
    "plain, centred": (Design("centring"), (10, 24)),
    "plain, BatchNorm": (_PLAIN, (24,)),
    "residual, BatchNorm, β = 1": (_RESIDUAL, (10, 24, 50)),
    "residual, BatchNorm, β = 0.1": (Design("BatchNorm", beta=0.1), (50,)),
    "plain, not centred, He": (Design("none"), (24,)),
    "plain, not centred, PyTorch's default": (Design("none", weights="default"), (24,)),
}


@dataclass(frozen=True)
class Autocorrelation:
    """Mean autocorrelation of dy/dx over the points at lags 0, 1, …, the mean's standard errors, and a covariance.

    `covariance` is that of the derivatives at every fourth pair of points, over their standard deviations.
    """

    network: str
    depth: int | None
    lags: list[float]
    errors: list[float]
    covariance: list[list[float]]

    @property
    def label(self) -> str:
        """The network with its depth."""
        return self.network if self.depth is None else f"{self.network}, {self.depth} layers"


@dataclass(frozen=True)
class Correlation:
    """The mean correlation of the gradients of two random inputs by depth, with standard errors, and the theory's."""

    network: str
    depths: list[int]
    values: list[float]
    errors: list[float]
    theory: list[float]


@dataclass(frozen=True)
class Shattered(Result):
    """The autocorrelations and the correlations."""

    name: ClassVar[str] = "shattered"
    title: ClassVar[str] = "Shattered gradients: how alike neighbours' gradients are"
    size: ClassVar[tuple[float, float]] = (14.0, 8.4)
    networks: list[Autocorrelation]
    correlations: list[Correlation]

    def conclusion(self) -> str:
        """Return what the numbers say."""
        said = "; ".join(f"{each.label} {each.lags[1]:.2f} / {each.lags[5]:.2f}" for each in self.networks)
        text = f"Autocorrelation of the derivative at lag 1 / lag 5: {said}."
        for each in self.correlations:
            first, last = each.depths[0], each.depths[-1]
            if each.network == "plain":
                off = max(abs(value / theory - 1) for value, theory in zip(each.values, each.theory, strict=True))
                text += (
                    f" Correlation over random pairs: plain {each.values[0]:.3f} at {first} to {each.values[-1]:.4f} "
                    f"at {last} layers, within {off:.0%} of 2^−L;"
                )
            else:
                low = each.depths.index(10)
                power = math.log(each.values[-1] / each.values[low]) / math.log(last / 10)
                text += (
                    f" residual {each.values[low]:.3f} at 10 to {each.values[-1]:.3f} at {last}, a power of "
                    f"{power:.2f}, where 1/√L of the paper has −0.50. With the variance about the mean in BatchNorm, "
                    f"theory has {each.theory[low]:.3f} to {each.theory[-1]:.3f}."
                )
        return text

    def draw(self, figure: Figure) -> None:
        """Draw the autocorrelations, the correlations by depth, and covariances."""
        top, bottom = figure.subfigures(2, 1, squeeze=False).flat
        autocorrelation, *others = top.subplots(1, 2 if self.correlations else 1, squeeze=False)[0]
        for index, each in enumerate(self.networks):
            colour, line = COLOURS[index % len(COLOURS)], "-:"[index // len(COLOURS)]
            autocorrelation.plot(
                range(len(each.lags)), each.lags, line, marker="o", ms=2, color=colour, label=each.label
            )
        style(autocorrelation, "Autocorrelation of dy/dx", "lag in points", "autocorrelation")
        autocorrelation.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for axis in others:
            _draw_correlations(axis, self.correlations)
        chosen = _chosen(self.networks)
        axes = bottom.subplots(1, len(chosen), squeeze=False)[0]
        for axis, each in zip(axes, chosen, strict=True):
            shown = axis.imshow(each.covariance, vmin=-1, vmax=1, cmap="RdBu_r", extent=(0, 1, 1, 0))
            style(axis, f"Correlation of dy/dx\n{each.label}", "place of one input", "place of the other")
            axis.grid(False)
        bottom.colorbar(shown, ax=axes, shrink=0.8, label="correlation over the networks")


def shattered(model: nn.Module, start: Tensor, end: Tensor, points: int = POINTS, output: int = 0) -> Shattered:
    """Return how alike the derivatives of an output of a model are along the line between two inputs.

    BatchNorm's statistics are constants in the gradient: the running ones in eval mode, else those of the points.

    Args:
        model: any model from inputs (N, …) to outputs (N, classes); it stays as it was.
        start, end: inputs (1, …).
        output: which of the model's outputs is differentiated.

    Raises: AnalysisError: the inputs are not of one shape (1, …), or there are too few points.
    """
    if start.shape != end.shape or start.shape[:1] != (1,):
        raise AnalysisError(
            f"shattered: start and end must be of one shape (1, …), got {tuple(start.shape)} and {tuple(end.shape)}"
        )
    if points < 2 * LAGS:
        raise AnalysisError(f"shattered: points must be at least {2 * LAGS}, got {points}")
    check_images(start)
    place = torch.linspace(0, 1, points, dtype=start.dtype, device=start.device)
    inputs = start + place.view(-1, *[1] * (start.dim() - 1)) * (end - start)
    with undisturbed():
        model, inputs = copy_of(model), inputs.detach().clone()
        norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        if any(norm.training for norm in norms):
            set_statistics(model, inputs)
        model.eval()
        grads = []
        for part in inputs.split(_POINTS_AT_ONCE):
            x = part.detach().requires_grad_()
            grads.append(torch.autograd.grad(logits_of(model(x))[:, output].sum(), x)[0])
    along = (torch.cat(grads) * (end - start)).flatten(1).double().sum(1)
    return Shattered([_autocorrelation(type(model).__name__, None, along[None])], [])


def shattered_by_depth(seeds: int = FULL.shattered_seeds, progress: bool = False) -> Shattered:
    """Return how alike the derivatives of random networks are, by depth, with white and brown noise beside.

    Args:
        seeds: how many networks of each kind.
        progress: show a progress bar on a terminal.

    Raises: AnalysisError: there are no seeds.
    """
    if seeds < 1:
        raise AnalysisError(f"shattered: there must be seeds, got {seeds}")
    parts = [range(first, min(first + _SEEDS_AT_ONCE, seeds)) for first in range(0, seeds, _SEEDS_AT_ONCE)]
    found = _noise(seeds)
    with tqdm(total=len(parts) * (len(NETWORKS) + 2), disable=None if progress else True) as bar:
        for name, (design, depths) in NETWORKS.items():
            of_depth: dict[int, list[Tensor]] = {depth: [] for depth in depths}
            for part in parts:
                for depth, values in derivatives(design, depths, POINTS, part).items():
                    of_depth[depth].append(values)
                bar.update()
            found += [_autocorrelation(name, depth, torch.cat(values)) for depth, values in of_depth.items()]
        plain, residual = [], []
        for part in parts:
            plain.append(correlation(_PLAIN, _PLAIN_DEPTHS, part))
            bar.update()
            residual.append(correlation(_RESIDUAL, _RESIDUAL_DEPTHS, part))
            bar.update()
    halves = [2.0**-depth for depth in _PLAIN_DEPTHS]
    theory = [residual_theory(depth, 1.0) for depth in _RESIDUAL_DEPTHS]
    return Shattered(found, [_correlation("plain", plain, halves), _correlation("residual", residual, theory)])


def _autocorrelation(network: str, depth: int | None, values: Tensor) -> Autocorrelation:
    """Return the autocorrelation of derivatives (networks, points): of each network, then the mean."""
    values = values.double()
    centred = values - values.mean(-1, keepdim=True)
    energy = centred.square().sum(-1)
    lags = torch.stack(
        [(centred[:, : centred.shape[1] - k] * centred[:, k:]).sum(-1) / energy for k in range(LAGS + 1)]
    )
    count = len(values)
    errors = lags.std(1) / math.sqrt(count) if count > 1 else torch.zeros(LAGS + 1)
    shown = values[:, ::_SHOWN] / values.square().mean(-1, keepdim=True).sqrt()
    covariance = shown.mT @ shown / count
    spread = covariance.diagonal().sqrt()
    covariance = (covariance / (spread[:, None] * spread)).mul(1000).round() / 1000
    return Autocorrelation(network, depth, lags.mean(1).tolist(), errors.tolist(), covariance.tolist())


def _noise(seeds: int) -> list[Autocorrelation]:
    """Return the autocorrelations of white and brown noise."""
    white = torch.randn(max(seeds, 1), POINTS, generator=torch.Generator().manual_seed(0))
    return [_autocorrelation("white noise", None, white), _autocorrelation("brown noise", None, white.cumsum(-1))]


def _correlation(network: str, parts: list[dict[int, Tensor]], theory: list[float]) -> Correlation:
    depths = sorted(parts[0])
    values = [torch.cat([part[depth] for part in parts]).double() for depth in depths]
    errors = [each.std().item() / math.sqrt(len(each)) if len(each) > 1 else 0.0 for each in values]
    return Correlation(network, depths, [each.mean().item() for each in values], errors, theory)


def _chosen(networks: list[Autocorrelation]) -> list[Autocorrelation]:
    """Return the networks whose covariance is drawn."""
    wanted = ("white noise", "plain, BatchNorm, 24 layers", "residual, BatchNorm, β = 0.1, 50 layers", "brown noise")
    return [each for label in wanted for each in networks if each.label == label] or networks


def _draw_correlations(axis: Axes, found: list[Correlation]) -> None:
    for each, colour in zip(found, cycle(COLOURS)):
        label = f"{each.network}, measured"
        axis.errorbar(each.depths, each.values, each.errors, fmt="o", ms=4, color=colour, label=label)
        theory = "2^−L" if each.network == "plain" else "theory with the variance about the mean"
        axis.plot(each.depths, each.theory, color=colour, label=f"{each.network}, {theory}")
    depths = found[-1].depths
    axis.plot(depths, [depth**-0.5 for depth in depths], ":", color="#000000", label="residual, 1/√L of the paper")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_ylim(bottom=1e-4)
    style(axis, "Correlation of gradients over random inputs, β = 1", "layers", "correlation")
