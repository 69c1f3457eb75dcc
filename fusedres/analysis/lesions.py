"""What a network answers with one of its blocks deleted, or with blocks swapped.

Source: Veit, Wilber and Belongie 2016, Residual Networks Behave Like Ensembles of Relatively Shallow Networks,
https://arxiv.org/abs/1605.06431, section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusedres.analysis.observing import Loss, Observed
from fusedres.analysis.results import needed


@dataclass(frozen=True)
class Deletion:
    """The loss and the share of wrong answers with one block deleted: only its shortcut is left, if it has one.

    `changes_shape` is true where the shortcut is no identity.
    """

    name: str
    changes_shape: bool
    loss: float
    error: float


@dataclass(frozen=True)
class Permutation:
    """The loss and the share of wrong answers with blocks swapped, and Kendall's τ of the order to that before."""

    swaps: int
    tau: float
    loss: float
    error: float


class _Function(nn.Module):
    """A function in a module's place."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Lesions:
    """Tests a copy of a model with some of its modules replaced; its result are logits (N, classes)."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss) -> None:
        self.model, self.images, self.labels, self.loss = copy.deepcopy(model), images, labels, loss

    @torch.no_grad()
    def score(self, replaced: dict[str, nn.Module]) -> tuple[float, float]:
        """Return the loss and the share of wrong answers."""
        stock = {name: self.model.get_submodule(name) for name in replaced}
        try:
            for name, module in replaced.items():
                self.model.set_submodule(name, module)
            logits = self.model(self.images)
        finally:
            for name, module in stock.items():
                self.model.set_submodule(name, module)
        wrong = (logits.argmax(1) != self.labels).double().mean().item()
        return self.loss(logits, self.labels).item(), wrong

    def chance(self) -> float:
        """Return the share of wrong answers of one who always gives the most frequent label."""
        return 1 - self.labels.bincount().max().item() / len(self.labels)


def deletions(test: Lesions, seen: Sequence[Observed], bar: tqdm) -> list[Deletion]:
    """Return the scores with each block deleted; a plain block that changes the shape cannot be."""
    found = []
    for block, x, output, *_ in seen:
        if block.has_shortcut or x.shape == output.shape:
            changes = block.has_shortcut and not block.is_identity
            score = test.score({block.name: _Function(block.without_branch)})
            found.append(Deletion(block.name, changes, *score))
        bar.update()
    return found


def permutations(test: Lesions, seen: Sequence[Observed], count: int, bar: tqdm) -> list[Permutation]:
    """Return the scores with pairs of blocks swapped that read and return tensors of one shape, in one row."""
    groups: list[list[int]] = []
    for index, call in enumerate(seen):
        if call.x.shape != call.output.shape:
            continue
        if groups and groups[-1][-1] == index - 1 and seen[index - 1].x.shape == call.x.shape:
            groups[-1].append(index)
        else:
            groups.append([index])
    pairs = [(a, b) for group in groups for a in group for b in group if a < b]
    found: list[Permutation] = []
    random = torch.Generator().manual_seed(0)
    kendalltau = needed("scipy.stats").kendalltau
    most = len(seen)
    for trial in range(count if pairs else 0):
        swaps = 1 + trial * most // count
        order = list(range(len(seen)))
        for chosen in torch.randint(len(pairs), (swaps,), generator=random).tolist():
            a, b = pairs[chosen]
            order[a], order[b] = order[b], order[a]
        replaced = {
            seen[place].block.name: test.model.get_submodule(seen[index].block.name)
            for place, index in enumerate(order)
            if place != index
        }
        tau = float(kendalltau(range(len(order)), order).statistic)
        found.append(Permutation(swaps, tau, *test.score(replaced)))
        bar.update()
    return found
