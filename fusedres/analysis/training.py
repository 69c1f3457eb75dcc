"""Trains small networks, and goes on where a killed run was: the result is the same bit by bit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fusedres.analysis.data import Data
from fusedres.analysis.results import AnalysisError
from fusedres.analysis.work import Run, Work

SECONDS_BETWEEN_CHECKPOINTS = 5.0
_CHECKPOINT, _WEIGHTS = "checkpoint", "weights of "
_EVALUATED_AT_ONCE = 2048


class Recipe(NamedTuple):
    """How networks are trained: SGD with momentum, a linear warm-up of the learning rate, then a cosine to 0."""

    epochs: int
    learning_rate: float
    batch: int = 64
    momentum: float = 0.9
    warm_up: float = 0.1  # share of the steps

    def rate(self, progress: float) -> float:
        """Return the learning rate after this share of the steps."""
        if progress < self.warm_up:
            return self.learning_rate * progress / self.warm_up
        if self.warm_up >= 1:
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (progress - self.warm_up) / (1 - self.warm_up))) / 2


def settings_of(data: Data, recipe: Recipe, networks: Mapping[str, Callable[[], nn.Module]]) -> dict[str, Any]:
    """Return all that training these networks depends on, as JSON types: checksums stand for data and networks."""
    made = {name: _checksum(make, data.images[:2]) for name, make in networks.items()}
    return {"data": data.checksum(), "recipe": recipe, "networks": made}


def _checksum(make: Callable[[], nn.Module], images: Tensor) -> str:
    """Return a checksum of a network with the weights that it gets from seed 0, and of what it makes of images."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make()
        tensors = {**model.state_dict(), "result": model(images)}
    found = hashlib.sha256(repr(model).encode())
    for name, tensor in tensors.items():
        found.update(name.encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def work_on(
    networks: Mapping[str, Callable[[], nn.Module]],
    data: Data,
    recipe: Recipe,
    seeds: int,
    folder: Path | None,
    keeps_weights: bool = False,
) -> Work:
    """Return the work of training these networks from so many seeds.

    Raises: what Work raises; AnalysisError: there is nothing to train.
    """
    if seeds < 1 or not networks:
        raise AnalysisError(f"analysis: there must be seeds and networks, got {seeds} and {len(networks)}")
    return Work(folder, {} if folder is None else settings_of(data, recipe, networks), keeps_weights)


def train(
    network: str, make: Callable[[], nn.Module], data: Data, recipe: Recipe, seed: int, work: Work, bar: tqdm
) -> tuple[Run, nn.Module | None]:
    """Train a new network and return the run, and the network in eval mode; None if it was finished and not kept.

    The seed decides about the weights, the order of the images and dropout. The global random state stays as it was.
    """
    key = f"{network}, seed {seed}"
    finished = work.run(key)
    if finished is not None and not work.keeps_weights:
        bar.update(recipe.epochs)
        return finished, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().to(memory_format=torch.channels_last)
        weights = work.load(f"{_WEIGHTS}{key}")
        if finished is not None and weights is not None:
            model.load_state_dict(weights)
            bar.update(recipe.epochs)
            return finished, model.eval()
        losses = _train(model, data, recipe, seed, work, key, bar)
    set_statistics(model, data.images)
    loss, accuracy = evaluate(model, data.images, data.labels)
    run = Run(network, seed, losses, loss, accuracy, evaluate(model, data.test_images, data.test_labels)[1])
    if work.keeps_weights:
        work.save(f"{_WEIGHTS}{key}", model.state_dict())
    work.finish(key, run)
    return run, model


@torch.no_grad()
def set_statistics(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics of a model's BatchNorms to their means over images, and the model to eval mode."""
    model.eval()
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    if norms:
        for part in images.split(_EVALUATED_AT_ONCE):
            model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the mean cross-entropy of a model and its accuracy, in the mode in which it is."""
    logits = torch.cat([model(part) for part in images.split(_EVALUATED_AT_ONCE)]).double()
    right = (logits.argmax(1) == labels).double().mean().item()
    return F.cross_entropy(logits, labels).item(), right


def _train(model: nn.Module, data: Data, recipe: Recipe, seed: int, work: Work, key: str, bar: tqdm) -> list[float]:
    """Train and return the losses of the epochs."""
    optimizer = torch.optim.SGD(model.parameters(), recipe.learning_rate, recipe.momentum)
    losses: list[float] = []
    state = work.load(_CHECKPOINT)
    if state is not None and state["key"] == key:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        losses = state["losses"]
        bar.update(len(losses))
    steps = math.ceil(len(data.labels) / recipe.batch)
    saved = time.monotonic()
    model.train()
    while len(losses) < recipe.epochs:
        epoch = len(losses)
        order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        total = 0.0
        for step, indices in enumerate(order.chunk(steps)):
            optimizer.param_groups[0]["lr"] = recipe.rate((epoch + step / steps) / recipe.epochs)
            loss = F.cross_entropy(model(data.images[indices]), data.labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(indices)
        losses.append(total / len(data.labels))
        bar.update()
        if time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            state = {"key": key, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            work.save(_CHECKPOINT, state | {"random": torch.get_rng_state(), "losses": losses})
            saved = time.monotonic()
    return losses
