"""Residual networks as ensembles: what deleting or permuting blocks does, and which paths carry the gradient.

Source: Veit, Wilber and Belongie 2016, Residual Networks Behave Like Ensembles of Relatively Shallow Networks,
https://arxiv.org/abs/1605.06431.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from tqdm import tqdm

from fusedres.analysis.blocks import copy_of
from fusedres.analysis.data import Data
from fusedres.analysis.lesions import Deletion, Lesions, Permutation, deletions, permutations
from fusedres.analysis.observing import Loss, check_images, cross_entropy, observe
from fusedres.analysis.paths import SHARE, Paths, paths
from fusedres.analysis.results import COLOURS, Result, needed, style
from fusedres.analysis.sizes import FULL
from fusedres.analysis.training import Recipe, train, work_on
from fusedres.models import plain, resnet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IMAGES_OF_PATHS = 16
_FEWEST_ORDERS = 5  # for a rank correlation
_BLOCKS_OF_A_DEEP_NETWORK = 20


@dataclass(frozen=True)
class Ensemble:
    """One trained network: its loss, its share of wrong answers, and that of always giving the most frequent label.

    `paths` is None without shortcuts, and where other layers stand between the blocks.
    """

    network: str
    loss: float
    error: float
    chance: float
    deletions: list[Deletion]
    permutations: list[Permutation]
    paths: Paths | None


@dataclass(frozen=True)
class Ensembles(Result):
    """What was found in each network."""

    name: ClassVar[str] = "ensembles"
    title: ClassVar[str] = "Ensembles: deleted blocks, permuted blocks, and paths"
    size: ClassVar[tuple[float, float]] = (12.0, 8.4)
    networks: list[Ensemble]

    def conclusion(self) -> str:
        """Return what the numbers say."""
        return " ".join(_conclusion(network) for network in self.networks)

    def draw(self, figure: Figure) -> None:
        """Draw the errors with deleted and permuted blocks, the lengths of paths, and the gradient by length."""
        (deleted, permuted), (lengths, gradient) = figure.subplots(2, 2)
        for network, colour in zip(self.networks, cycle(COLOURS)):
            _draw_lesions(deleted, permuted, network, colour)
            if network.paths is not None:
                _draw_paths(lengths, gradient, network.network, network.paths, colour)
        if not any(network.permutations for network in self.networks):
            permuted.text(0.3, 0.5, "no two blocks can be swapped", transform=permuted.transAxes)
        for axis in (deleted, permuted):
            axis.axhline(100 * self.networks[0].chance, color="#999999", ls=":", label="always the most frequent label")
        style(deleted, "One block deleted", "block (squares: the shortcut is no identity)", "wrong answers, %")
        style(permuted, "Blocks swapped", "1 − Kendall's τ", "wrong answers, %")
        style(lengths, "Paths by length", "branches on the path", "share")
        if any(each.norm for found in self.networks if found.paths for each in found.paths.lengths):
            gradient.set_yscale("log")
        style(gradient, "Gradient at the first block, by path length", "branches on the path", "norm")


def networks_of(depths: tuple[int, int] = FULL.ensembles_depths) -> dict[str, Callable[[], nn.Module]]:
    """Return functions that make a residual network of the first depth and a plain one of the second, by name."""
    deep, shallow = depths
    return {f"ResNet-{deep}": lambda: resnet(deep), f"plain-{shallow}": lambda: plain(shallow)}


def ensembles(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Loss = cross_entropy,
    names: Sequence[str] | None = None,
    trials: int = FULL.ensembles_trials,
    progress: bool = False,
) -> Ensembles:
    """Return what deleting and permuting the blocks of a trained model does, and the gradient by path length.

    Args:
        model: any model with residual blocks, fused or not; a copy runs, in eval mode. It returns logits (N, classes),
            or something with an attribute logits.
        images: (N, …), floating, in the model's dtype, to test it with.
        labels: (N,), int64. The gradient is that of loss(model(images), labels) for the first 16.
        names: of the modules that are the blocks; None: see residual_blocks.
        trials: how many permutations are tried, of more and more swapped pairs.

    Raises: ValueError: there are no blocks, or they draw random numbers.
    """
    with tqdm(unit="test", disable=None if progress else True) as bar:
        found = _ensemble(type(model).__name__, model, images, labels, loss, names, trials, bar)
    return Ensembles([found])


def ensembles_of_trained(
    data: Data,
    networks: Mapping[str, Callable[[], nn.Module]] | None = None,
    recipe: Recipe = FULL.ensembles,
    folder: Path | None = None,
    seeds: int = 1,
    trials: int = FULL.ensembles_trials,
    progress: bool = False,
) -> Ensembles:
    """Train networks and return what is found in each, on the held-out images.

    Args:
        data: what to train on and to test with; load() gives it.
        networks: functions that make a network, by name; None: those of networks_of().
        recipe: how each is trained.
        folder: for what a killed run has done, to go on there; None: nothing is kept.
        seeds: how many networks of each name.
        trials: see ensembles.
        progress: show a progress bar on a terminal.

    Raises: AnalysisError: there are no networks or seeds, or another process works in the folder.
    """
    if networks is None:
        networks, data = networks_of(), data.in_colour()
    epochs = recipe.epochs * len(networks) * seeds
    test = data.test_images, data.test_labels
    found = []
    with (
        work_on(networks, data, recipe, seeds, folder, keeps_weights=True) as work,
        tqdm(total=epochs, unit="epoch", disable=None if progress else True) as bar,
    ):
        for name, seed in product(networks, range(seeds)):
            _, model = train(name, networks[name], data, recipe, seed, work, bar)
            assert model is not None
            shown = name if seeds == 1 else f"{name}, seed {seed}"
            with tqdm(unit="test", leave=False, disable=None if progress else True) as tests:
                found.append(_ensemble(shown, model, *test, cross_entropy, None, trials, tests))
    return Ensembles(found)


def _ensemble(
    network: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    loss: Loss,
    names: Sequence[str] | None,
    trials: int,
    bar: tqdm,
) -> Ensemble:
    """Return what is found in one network."""
    check_images(images)
    model = copy_of(model).eval()
    seen = observe(model, images[:_IMAGES_OF_PATHS], labels[:_IMAGES_OF_PATHS], loss, names)
    lesions = Lesions(model, images, labels, loss, names)
    before, error = lesions.score({})
    deleted, permuted = deletions(lesions, seen, bar), permutations(lesions, seen, trials, bar)
    return Ensemble(network, before, error, lesions.chance(), deleted, permuted, paths(seen, bar))


def _conclusion(found: Ensemble) -> str:
    text = f"{found.network} has {found.error:.1%} wrong answers ({found.chance:.0%} is chance)"
    if found.deletions:
        worst = max(found.deletions, key=lambda each: each.error)
        typical = median(each.error for each in found.deletions)
        text += f"; with one block deleted {typical:.1%} in the median and {worst.error:.1%} at most ({worst.name})"
    taus, errors = [each.tau for each in found.permutations], [each.error for each in found.permutations]
    if len(set(taus)) >= _FEWEST_ORDERS and len(set(errors)) > 1:
        rank = float(needed("scipy.stats").spearmanr(taus, errors).statistic)
        text += f"; the rank correlation of the error with 1 − τ of the order is {-rank:.2f}"
    if found.paths is not None:
        first, last = found.paths.carrying(found.paths.sizes)
        share = found.paths.share_of_paths(first, last)
        text += (
            f"; paths have {found.paths.mean_length:g} branches on average, but {SHARE:.0%} of the norms of all paths' "
            f"gradients are on those with {first} to {last}, {share:.2%} of all"
        )
        low, high = found.paths.carrying([each.of_sum for each in found.paths.lengths])
        text += f", and of the sums by length on {low} to {high}"
        if len(found.paths.lengths) > _BLOCKS_OF_A_DEEP_NETWORK:
            text += " (in the paper, of 54 blocks, 5 to 17, 0.45%)"
    return f"{text}."


def _draw_lesions(deleted: Axes, permuted: Axes, found: Ensemble, colour: str) -> None:
    name = found.network
    for keeps, marker in ((True, "o"), (False, "s")):
        chosen = [(i, each) for i, each in enumerate(found.deletions) if each.keeps_input is keeps]
        label = f"{name}, one block deleted" if keeps else None
        where, errors = [i for i, _ in chosen], [100 * each.error for _, each in chosen]
        deleted.plot(where, errors, marker, ms=5, color=colour, label=label)
    deleted.axhline(100 * found.error, color=colour, lw=1, label=f"{name}, whole")
    distances = [1 - each.tau for each in found.permutations]
    permuted.plot(distances, [100 * each.error for each in found.permutations], "o", ms=4, color=colour, label=name)


def _draw_paths(lengths: Axes, gradient: Axes, name: str, found: Paths, colour: str) -> None:
    first, last = found.carrying(found.sizes)
    where = [each.length for each in found.lengths]
    total = sum(each.paths for each in found.lengths)
    sizes = found.sizes
    shares = [size / max(sum(sizes), 1e-300) for size in sizes]
    paths_of = [each.paths / total for each in found.lengths]
    lengths.bar(where, paths_of, color=colour, alpha=0.4, label=f"{name}: share of all paths, Binomial(n, ½)")
    lengths.plot(where, shares, "o-", ms=3, color="#000000", label=f"{name}: share of all paths' norms")
    lengths.axvspan(first - 0.5, last + 0.5, color="#E69F00", alpha=0.15, label=f"{SHARE:.0%} of all paths' norms")
    norms, sums = [each.norm for each in found.lengths], [each.of_sum for each in found.lengths]
    gradient.plot(where, norms, ":", color=colour, label=f"{name}: one path (mean)")
    gradient.plot(where, sizes, "--", color=colour, label=f"{name}: one path times their number")
    gradient.plot(where, sums, "-", color=colour, label=f"{name}: sum of all paths, exact")
