"""What a network answers with one of its blocks deleted, or with blocks swapped.

Source: Veit, Wilber and Belongie 2016, Residual Networks Behave Like Ensembles of Relatively Shallow Networks,
https://arxiv.org/abs/1605.06431, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fusedres.analysis.blocks import residual_blocks
from fusedres.analysis.observing import Loss, Observed, logits_of, undisturbed
from fusedres.analysis.results import AnalysisError, needed


@dataclass(frozen=True)
class Deletion:
    """The loss and the share of wrong answers with one block deleted: only its shortcut is left, if it has one.

    `keeps_input`: what is left is the block's input, as the shortcut is the identity, or there is none.
    """

    name: str
    keeps_input: bool
    loss: float
    error: float


@dataclass(frozen=True)
class Permutation:
    """The loss and the share of wrong answers with blocks swapped, and Kendall's τ of the order to that before."""

    swaps: int
    tau: float
    loss: float
    error: float


class Lesions:
    """Tests a model with other functions in place of some calls of its blocks; it should be a copy, as it gets hooks.

    Raises: AnalysisError: labels are no classes (N,).
    """

    def __init__(
        self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, names: Sequence[str] | None
    ) -> None:
        if labels.dim() != 1 or labels.dtype is not torch.int64 or len(labels) != len(images):
            raise AnalysisError(
                f"ensembles: labels must be int64 of shape ({len(images)},), got {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        self._model, self._images, self._labels, self._loss = model, images, labels, loss
        self._replaced: Mapping[int, Callable[[Tensor], Tensor]] = {}
        self._calls = 0
        for block in residual_blocks(self._model, names):
            block.module.register_forward_hook(self._after)

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Return what stands for the output of a block's call."""
        replacement = self._replaced.get(self._calls)
        self._calls += 1
        return output if replacement is None else replacement(args[0])

    def score(self, replaced: Mapping[int, Callable[[Tensor], Tensor]]) -> tuple[float, float]:
        """Return the loss and the share of wrong answers.

        Args:
            replaced: the functions, by the index of the call.
        """
        self._replaced, self._calls = replaced, 0
        with undisturbed(), torch.no_grad():
            result = self._model(self._images)
            loss = self._loss(result, self._labels).item()
        return loss, (logits_of(result).argmax(1) != self._labels).double().mean().item()

    def chance(self) -> float:
        """Return the share of wrong answers of one who always gives the most frequent label."""
        return 1 - self._labels.bincount().max().item() / len(self._labels)


def deletions(lesions: Lesions, seen: Sequence[Observed], bar: tqdm) -> list[Deletion]:
    """Return the scores with each block deleted; a plain block that changes the shape cannot be."""
    found = []
    for index, (block, x, output, *_) in enumerate(seen):
        if block.has_shortcut or x.shape == output.shape:
            score = lesions.score({index: block.without_branch})
            found.append(Deletion(block.name, block.is_identity or not block.has_shortcut, *score))
        bar.update()
    return found


def permutations(lesions: Lesions, seen: Sequence[Observed], count: int, bar: tqdm) -> list[Permutation]:
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
    for trial in range(count if pairs else 0):
        swaps = 1 + trial * len(seen) // count
        order = list(range(len(seen)))
        for chosen in torch.randint(len(pairs), (swaps,), generator=random).tolist():
            a, b = pairs[chosen]
            order[a], order[b] = order[b], order[a]
        replaced = {place: _whole(seen[index]) for place, index in enumerate(order) if place != index}
        tau = float(kendalltau(range(len(order)), order).statistic)
        found.append(Permutation(swaps, tau, *lesions.score(replaced)))
        bar.update()
    return found


def _whole(call: Observed) -> Callable[[Tensor], Tensor]:
    return lambda x: call.block.apply(x, x)
