"""Residual networks as ensembles: what deleting or permuting blocks does, and which paths carry the gradient.

Source: Veit, Wilber and Belongie 2016, Residual Networks Behave Like Ensembles of Relatively Shallow Networks,
https://arxiv.org/abs/1605.06431.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fusedres.analysis.data import Data
from fusedres.analysis.lesions import Deletion, Lesions, Permutation, deletions, permutations
from fusedres.analysis.observing import Loss, observe
from fusedres.analysis.paths import SHARE, Paths, paths
from fusedres.analysis.results import COLOURS, Result, needed, style
from fusedres.analysis.sizes import FULL
from fusedres.analysis.training import Recipe, Work, settings_of, train
from fusedres.models import plain, resnet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IMAGES_OF_PATHS = 16


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
        for network, colour in zip(self.networks, COLOURS, strict=False):
            _draw_lesions(deleted, permuted, network, colour)
            if network.paths is not None:
                _draw_paths(lengths, gradient, network.network, network.paths, colour)
        for axis in (deleted, permuted):
            axis.axhline(100 * self.networks[0].chance, color="#999999", ls=":", label="always the most frequent label")
        style(deleted, "One block deleted", "block (squares: the shape changes)", "wrong answers, %")
        style(permuted, "Blocks swapped", "1 − Kendall's τ", "wrong answers, %")
        style(lengths, "Paths by length", "branches on the path", "share")
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
    loss: Loss = F.cross_entropy,
    names: Sequence[str] | None = None,
    trials: int = FULL.ensembles_trials,
    progress: bool = False,
) -> Ensembles:
    """Return what deleting and permuting the blocks of a trained model does, and the gradient by path length.

    Args:
        model: any model with residual blocks, fused or not, in eval mode; its result are logits (N, classes). It stays
            as it was.
        images, labels: to test it with; the gradient is that of loss(model(images), labels) for the first 16.
        names: of the modules that are the blocks; None: see residual_blocks.
        trials: how many permutations are tried, of more and more swapped pairs.

    Raises: ValueError: there are no blocks, or they draw random numbers.
    """
    with tqdm(unit="test", disable=None if progress else True) as bar:
        found = _ensemble(type(model).__name__, model, (images, labels), loss, (names, trials), bar)
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
        networks: functions that make a network, by name; None: those of networks_of().
        folder: for what a killed run has done, to go on there; None: nothing is kept.
    """
    networks = networks or networks_of()
    work = Work(folder, settings_of(data, recipe, networks), keeps_weights=True)
    test = data.test_images, data.test_labels
    found = []
    with tqdm(total=recipe.epochs * len(networks) * seeds, unit="epoch", disable=None if progress else True) as bar:
        for name, seed in product(networks, range(seeds)):
            _, model = train(name, networks[name], data, recipe, seed, work, bar)
            assert model is not None
            shown = name if seeds == 1 else f"{name}, seed {seed}"
            with tqdm(unit="test", leave=False, disable=None if progress else True) as tests:
                found.append(_ensemble(shown, model, test, F.cross_entropy, (None, trials), tests))
    return Ensembles(found)


def _ensemble(
    network: str,
    model: nn.Module,
    test: tuple[Tensor, Tensor],
    loss: Loss,
    options: tuple[Sequence[str] | None, int],
    bar: tqdm,
) -> Ensemble:
    """Return what is found in one network; test: images and labels; options: names of blocks, and trials."""
    (images, labels), (names, trials) = test, options
    seen = observe(model, images[:_IMAGES_OF_PATHS], labels[:_IMAGES_OF_PATHS], loss, names)
    lesions = Lesions(model, images, labels, loss)
    before, error = lesions.score({})
    deleted, permuted = deletions(lesions, seen, bar), permutations(lesions, seen, trials, bar)
    return Ensemble(network, before, error, lesions.chance(), deleted, permuted, paths(seen, bar))


def _conclusion(found: Ensemble) -> str:
    deleted = [each for each in found.deletions if not each.changes_shape]
    worst = max(found.deletions, key=lambda each: each.error, default=None)
    text = f"{found.network} has {found.error:.1%} wrong answers ({found.chance:.0%} is chance)"
    if deleted and worst is not None:
        text += f"; with one block deleted {median(each.error for each in deleted):.1%} (median)"
        text += f", at most {worst.error:.1%} ({worst.name}{', where the shape changes' * worst.changes_shape})"
    if found.permutations:
        taus, errors = [each.tau for each in found.permutations], [each.error for each in found.permutations]
        if len(set(taus)) > 1 and len(set(errors)) > 1:
            rank = float(needed("scipy.stats").spearmanr(taus, errors).statistic)
            text += f"; the rank correlation of the error with 1 − τ of the order is {-rank:.2f}"
    if found.paths is not None:
        first, last = found.paths.carrying()
        share = found.paths.share_of_paths(first, last)
        text += (
            f"; paths have {found.paths.mean_length:g} branches on average, but {SHARE:.0%} of the gradient's size is "
            f"on those with {first} to {last}, {share:.2%} of all (in the paper, of 54 blocks, 5 to 17, 0.45%)"
        )
    return f"{text}."


def _draw_lesions(deleted: Axes, permuted: Axes, found: Ensemble, colour: str) -> None:
    name = found.network
    for changes, marker in ((False, "o"), (True, "s")):
        chosen = [(i, each) for i, each in enumerate(found.deletions) if each.changes_shape is changes]
        label = f"{name}, one block deleted" if not changes else None
        where, errors = [i for i, _ in chosen], [100 * each.error for _, each in chosen]
        deleted.plot(where, errors, marker, ms=5, color=colour, label=label)
    deleted.axhline(100 * found.error, color=colour, lw=1, label=f"{name}, whole")
    distances = [1 - each.tau for each in found.permutations]
    permuted.plot(distances, [100 * each.error for each in found.permutations], "o", ms=4, color=colour, label=name)


def _draw_paths(lengths: Axes, gradient: Axes, name: str, found: Paths, colour: str) -> None:
    first, last = found.carrying()
    where = [each.length for each in found.lengths]
    total = sum(each.paths for each in found.lengths)
    sizes = [each.paths * each.norm for each in found.lengths]
    shares = [size / sum(sizes) for size in sizes]
    paths_of = [each.paths / total for each in found.lengths]
    lengths.bar(where, paths_of, color=colour, alpha=0.4, label=f"{name}: share of all paths, Binomial(n, ½)")
    lengths.plot(where, shares, "o-", ms=3, color="#000000", label=f"{name}: share of the gradient's size")
    lengths.axvspan(first - 0.5, last + 0.5, color="#E69F00", alpha=0.15, label=f"{SHARE:.0%} of the gradient's size")
    norms, sums = [each.norm for each in found.lengths], [each.of_sum for each in found.lengths]
    gradient.plot(where, norms, ":", color=colour, label=f"{name}: one path (mean)")
    gradient.plot(where, sizes, "--", color=colour, label=f"{name}: one path times their number")
    gradient.plot(where, sums, "-", color=colour, label=f"{name}: sum of all paths, exact")
