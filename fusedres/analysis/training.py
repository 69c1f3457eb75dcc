"""Trains small networks, and goes on where a killed run was: the result is the same bit by bit."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fusedres import files
from fusedres._version import __version__
from fusedres.analysis.data import Data
from fusedres.analysis.results import AnalysisError
from fusedres.backends import backend_for

SECONDS_BETWEEN_CHECKPOINTS = 5.0
_PREFIX = "fusedres-"  # of all files here
_RUNS, _LOCK = f"{_PREFIX}runs.json", f"{_PREFIX}lock"
_CHECKPOINT, _WEIGHTS = "checkpoint", "weights of "
_EVALUATED_AT_ONCE = 2048
_LARGEST_FILE = 1 << 30


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


@dataclass(frozen=True)
class Run:
    """One network, trained from one seed.

    `losses` are the mean training losses of the epochs. `loss` and `accuracy` are those of the training images at the
    end, `test_accuracy` that of the held-out ones. They are measured in eval mode, with BatchNorm's statistics computed
    once more over all training images, as the running ones lag behind after a short training.
    """

    network: str
    seed: int
    losses: list[float]
    loss: float
    accuracy: float
    test_accuracy: float


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


class Work:
    """What a run of an experiment has done so far, in a folder; None: nothing is kept.

    One process at a time works in a folder. What another version, other settings, another backend or another number of
    threads left there does not count. Files with other names than ours stay.

    Args:
        settings: all that the result depends on, as JSON types.
        keeps_weights: of finished runs.

    Raises:
        AnalysisError: another process works in the folder.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], keeps_weights: bool = False) -> None:
        self.folder, self.keeps_weights = folder, keeps_weights
        made_by = {
            "fusedres": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "backend": backend_for("cpu"),
            "settings": settings,
        }
        self._made_by = json.loads(json.dumps(made_by))
        self._runs: dict[str, Any] = {}
        self._lock: int | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise AnalysisError(f"analyze: one process at a time can work in {folder}; choose another --out") from error
        found = _parsed(self._read(_RUNS))
        if found.get("made_by") == self._made_by:
            self._runs = found["runs"]

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def run(self, key: str) -> Run | None:
        """Return a finished run."""
        return Run(**self._runs[key]) if key in self._runs else None

    def finish(self, key: str, run: Run) -> None:
        """Keep a finished run."""
        self._runs[key] = asdict(run)
        self._write(_RUNS, json.dumps({"made_by": self._made_by, "runs": self._runs}).encode())

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep the state of training."""
        if self.folder is not None:
            data = io.BytesIO()
            torch.save({"made_by": json.dumps(self._made_by), "state": state}, data)
            self._write(f"{_PREFIX}{name}.pt", data.getvalue())

    def load(self, name: str) -> Any:
        """Return a state that was kept, or None."""
        data = self._read(f"{_PREFIX}{name}.pt")
        if data is None:
            return None
        try:
            found = torch.load(io.BytesIO(data), weights_only=True)
            return found["state"] if found["made_by"] == json.dumps(self._made_by) else None
        except Exception:  # a damaged file may raise anything; the run starts again
            return None

    def _read(self, name: str) -> bytes | None:
        try:
            return None if self.folder is None else files.read(self.folder / name, _LARGEST_FILE)
        except OSError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        if self.folder is not None:
            files.write(self.folder / name, data)


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


def remove(folder: Path) -> None:
    """Remove what runs have left in a folder; and the folder, and the one above it, if they are empty then."""
    with contextlib.suppress(OSError):
        for left in [*folder.glob(f"{_PREFIX}*"), *folder.glob(f".{_PREFIX}*.unfinished")]:
            left.unlink(missing_ok=True)
        folder.rmdir()
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


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


def _parsed(data: bytes | None) -> dict[str, Any]:
    """Return what a file of finished runs holds; of a damaged one nothing."""
    try:
        found = json.loads(data or b"{}")
        runs = {key: asdict(Run(**run)) for key, run in found["runs"].items()}
    except Exception:
        return {}
    return {"made_by": found.get("made_by"), "runs": runs}
