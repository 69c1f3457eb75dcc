"""Degradation: the training loss of plain networks rises with depth, that of residual networks does not.

Source: He et al. 2015, Deep Residual Learning, https://arxiv.org/abs/1512.03385, figure 1 and section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from fusedres.analysis.data import Data
from fusedres.analysis.results import COLOURS, Result, style
from fusedres.analysis.sizes import FULL
from fusedres.analysis.training import Recipe
from fusedres.analysis.variants import Variant, train_variants
from fusedres.models import plain, resnet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS: dict[str, Callable[[int], nn.Module]] = {"plain": plain, "residual": resnet}


@dataclass(frozen=True)
class Depth:
    """The runs of one design at one depth."""

    design: str
    depth: int
    trained: Variant


@dataclass(frozen=True)
class Degradation(Result):
    """The training losses by design and depth."""

    name: ClassVar[str] = "degradation"
    title: ClassVar[str] = "Degradation: training loss by depth"
    depths: list[Depth]

    def conclusion(self) -> str:
        """Return what the numbers say."""
        said = []
        for design, found in self._by_design().items():
            first, last = found[0], found[-1]
            ratio = last.trained.typical_loss / first.trained.typical_loss
            runs = zip(first.trained.runs, last.trained.runs, strict=True)
            higher = sum(deep.loss > shallow.loss for shallow, deep in runs)
            said.append(
                f"the training loss of {design} networks goes from {first.trained.said_loss} at depth {first.depth} to "
                f"{last.trained.said_loss} at depth {last.depth} ({ratio:.3g} times), higher in {higher} of "
                f"{len(first.trained.runs)} seeds"
            )
        text = "; ".join(said)
        return f"{text[0].upper()}{text[1:]}."

    def draw(self, figure: Figure) -> None:
        """Draw the training loss by depth with its intervals, and the losses of the deepest by epoch."""
        by_depth, curves = figure.subplots(1, 2)
        for (design, found), colour in zip(self._by_design().items(), COLOURS, strict=False):
            depths = [each.depth for each in found]
            logs = [each.trained.logarithm for each in found]
            means = [10**log.value for log in logs]
            by_depth.plot(depths, means, "o-", color=colour, label=f"{design}, geometric mean")
            if logs[0].half is not None:
                low, high = ([10 ** (log.value + sign * (log.half or 0)) for log in logs] for sign in (-1, 1))
                interval = f"{design}, 95 % interval"
                by_depth.fill_between(depths, low, high, color=colour, alpha=0.15, lw=0, label=interval)
            for index, run in enumerate(found[-1].trained.runs):
                label = f"{design}, depth {found[-1].depth}, each seed" if index == 0 else None
                curves.plot(range(1, len(run.losses) + 1), run.losses, color=colour, alpha=0.7, label=label)
        by_depth.set_yscale("log")
        curves.set_yscale("log")
        style(by_depth, "Training loss at the end", "depth in layers", "cross-entropy")
        style(curves, "Training loss by epoch, deepest networks", "epoch", "cross-entropy")

    def _by_design(self) -> dict[str, list[Depth]]:
        found: dict[str, list[Depth]] = {}
        for each in sorted(self.depths, key=lambda each: each.depth):
            found.setdefault(each.design, []).append(each)
        return dict(sorted(found.items()))


def degradation(
    data: Data,
    networks: Mapping[str, Callable[[int], nn.Module]] = NETWORKS,
    depths: Sequence[int] = FULL.degradation_depths,
    recipe: Recipe = FULL.degradation,
    seeds: int = FULL.seeds,
    folder: Path | None = None,
    progress: bool = False,
) -> Degradation:
    """Train networks of several depths and return their training losses.

    Args:
        data: in colour, for the networks given here.
        networks: functions that make a network of a depth, by design.
        folder: for what a killed run has done, to go on there; None: nothing is kept.
    """
    designs = {f"{design} {depth}": (design, depth) for depth in depths for design in networks}
    makes = {name: partial(networks[design], depth) for name, (design, depth) in designs.items()}
    trained = train_variants(makes, data, recipe, seeds, folder, progress)
    return Degradation([Depth(*designs[variant.network], variant) for variant in trained])
