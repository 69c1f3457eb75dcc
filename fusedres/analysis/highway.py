"""Highway networks: 50 fully connected layers train if the gates carry at the start.

Source: Srivastava, Greff and Schmidhuber 2015, Highway Networks, https://arxiv.org/abs/1505.00387, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fusedres.analysis.data import Data
from fusedres.analysis.results import Result
from fusedres.analysis.sizes import FULL
from fusedres.analysis.training import Recipe
from fusedres.analysis.variants import Variant, draw_variants, train_variants
from fusedres.models import HighwayNetwork

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH, _PLAIN_WIDTH = 50, 71  # about the same number of parameters


def plain_network(depth: int, in_features: int, classes: int) -> nn.Sequential:
    """Return linear layers with ReLU between them, in He's initialisation."""
    sizes = [in_features] + [_PLAIN_WIDTH] * (depth - 1)
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layer = nn.Linear(before, after)
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def networks_of_layers(data: Data, depth: int = FULL.highway_depth) -> dict[str, Callable[[], nn.Module]]:
    """Return functions that make the networks of this experiment, by name."""
    features, classes = data.images[0].numel(), data.classes
    return {
        "highway, b = −3": lambda: HighwayNetwork(depth, features, _WIDTH, classes, -3.0),
        "highway, b = 0": lambda: HighwayNetwork(depth, features, _WIDTH, classes, 0.0),
        "plain": lambda: plain_network(depth, features, classes),
    }


@dataclass(frozen=True)
class HighwayLayers(Result):
    """The training losses by network; `guess` is that of one that knows nothing."""

    name: ClassVar[str] = "highway"
    title: ClassVar[str] = "Highway: 50 layers with and without gates"
    guess: float
    variants: list[Variant]

    def conclusion(self) -> str:
        """Return what the numbers say."""
        seeds = len(self.variants[0].runs)
        said = [
            f"{variant.network} {variant.said_loss} "
            f"({sum(run.loss < self.guess / 2 for run in variant.runs)} of {seeds} seeds below half of a guess)"
            for variant in self.variants
        ]
        return f"Training loss after the same epochs: {'; '.join(said)}. A guess has {self.guess:.3g}."

    def draw(self, figure: Figure) -> None:
        """Draw the training losses at the end and by epoch."""
        ends, curves = figure.subplots(1, 2)
        ends.axvline(self.guess, color="#999999", lw=1, ls=":")
        curves.axhline(self.guess, color="#999999", lw=1, ls=":", label="a guess")
        draw_variants(ends, curves, self.variants)


def highway(
    data: Data,
    networks: Mapping[str, Callable[[], nn.Module]] | None = None,
    recipe: Recipe = FULL.highway,
    seeds: int = FULL.seeds,
    folder: Path | None = None,
    progress: bool = False,
) -> HighwayLayers:
    """Train deep networks of fully connected layers and return their training losses.

    Args:
        data: what to train on; load() gives it.
        networks: functions that make a network, by name; None: 50 layers, with gates whose bias is −3 or 0, and plain.
        recipe: how each is trained.
        seeds: how many networks of each.
        folder: for what a killed run has done, to go on there; None: nothing is kept.
        progress: show a progress bar on a terminal.

    Raises: AnalysisError: there are no networks or seeds, or another process works in the folder.
    """
    networks = networks_of_layers(data) if networks is None else networks
    trained = train_variants(networks, data, recipe, seeds, folder, progress)
    return HighwayLayers(math.log(data.classes), trained)
