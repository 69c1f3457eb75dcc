"""Training for the experiments: the same result from the same seed, also after a kill, and nothing else is touched."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.datasets import CIFAR10
from tqdm import tqdm

import fusedres
from fusedres.analysis import data as data_module
from fusedres.analysis import training
from fusedres.analysis.data import Data, load
from fusedres.analysis.results import AnalysisError, mean
from fusedres.analysis.training import Recipe, Run, Work, remove, settings_of, train

RECIPE = Recipe(epochs=4, learning_rate=0.1, batch=64)


@pytest.fixture(scope="module")
def data() -> Data:
    return load(images=192).in_colour()


class KilledError(Exception):
    """Stands for a kill."""


class Bar(tqdm):
    """A silent progress bar that kills after some epochs."""

    def __init__(self, epochs: int | None = None) -> None:
        super().__init__(disable=True)
        self.left = epochs
        self.seen = 0

    def update(self, n: float | None = 1) -> bool | None:
        self.seen += int(n or 0)
        if self.left is not None:
            self.left -= int(n or 0)
            if self.left == 0:
                raise KilledError
        return None


def network() -> nn.Module:
    block = fusedres.FusedBasicBlock(8, 8, 1, nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)))
    dropout = nn.Dropout(0.2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), block, dropout, nn.Flatten(), nn.Linear(128, 10))


def trained(data: Data, work: Work, bar: Bar | None = None, seed: int = 0) -> Run:
    return train("net", network, data, RECIPE, seed, work, Bar() if bar is None else bar)[0]


def test_training_lowers_the_loss_and_repeats_itself(data: Data) -> None:
    state = torch.get_rng_state()
    run = trained(data, Work(None, {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(run.losses) == 4 and run.losses[-1] < run.losses[0] / 2 and run.accuracy > 0.5
    torch.manual_seed(77)
    assert trained(data, Work(None, {})) == run
    assert trained(data, Work(None, {}), seed=1) != run


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_killed_run_goes_on_to_the_same_result(
    epochs: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    expected = trained(data, Work(None, {}))
    folder = tmp_path / "work"
    with pytest.raises(KilledError):
        trained(data, Work(folder, {"a": 1}), Bar(epochs))
    again = Bar()
    assert trained(data, Work(folder, {"a": 1}), again) == expected
    assert again.seen == RECIPE.epochs
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(state["losses"]) >= epochs - 1


def test_a_finished_run_is_not_repeated(data: Data, tmp_path: Path) -> None:
    expected = trained(data, Work(tmp_path, {}))

    def fails() -> nn.Module:
        raise AssertionError

    assert train("net", fails, data, RECIPE, 0, Work(tmp_path, {}), Bar()) == (expected, None)


def test_weights_are_kept_where_they_are_needed(data: Data, tmp_path: Path) -> None:
    first = train("net", network, data, RECIPE, 0, Work(tmp_path, {}, keeps_weights=True), Bar())[1]
    again = train("net", network, data, RECIPE, 0, Work(tmp_path, {}, keeps_weights=True), Bar())[1]
    assert first is not None and again is not None and not again.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_settings_see_every_difference(data: Data) -> None:
    def settings(data: Data, recipe: Recipe = RECIPE, bias: float = 0.0) -> object:
        return settings_of(data, recipe, {"net": lambda: fusedres.HighwayLinear(4, bias)})

    expected = settings(data)
    assert settings(data) == expected
    assert settings(data, bias=-3.0) != expected
    assert settings(data, RECIPE._replace(epochs=5)) != expected
    assert settings(data._replace(images=data.images + 1)) != expected
    assert settings(data.first(100)) != expected


def test_other_settings_start_again(data: Data, tmp_path: Path) -> None:
    trained(data, Work(tmp_path, {"seeds": 1}))
    assert Work(tmp_path, {"seeds": 1}).run("net, seed 0") is not None
    assert Work(tmp_path, {"seeds": 2}).run("net, seed 0") is None


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\x00", b'{"made_by": 3}'])
def test_damaged_files_start_again(content: bytes, data: Data, tmp_path: Path) -> None:
    expected = trained(data, Work(tmp_path, {}))
    for path in (tmp_path / "runs.json", tmp_path / "checkpoint.pt"):
        path.write_bytes(content)
    assert trained(data, Work(tmp_path, {})) == expected


def test_only_files_of_training_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "runs.json").write_text("{}")
    (tmp_path / "a" / "b" / "mine.txt").write_text("x")
    remove(tmp_path / "a" / "b")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["mine.txt"]
    (tmp_path / "a" / "b" / "mine.txt").unlink()
    remove(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_digits_are_split_by_class_and_normalised() -> None:
    found = load()
    assert found.images.shape[1:] == (1, 8, 8) and len(found.labels) + len(found.test_labels) == 1797
    assert found.classes == 10
    assert abs(found.images.mean().item()) < 1e-5 and abs(found.images.std().item() - 1) < 1e-3
    shares = found.test_labels.bincount() / (found.labels.bincount() + found.test_labels.bincount())
    assert (shares - 0.2).abs().max() < 0.01
    assert found.labels[:100].unique().numel() == 10  # classes are mixed
    assert len(load(images=50).labels) == 50
    assert torch.equal(load().images, found.images)


def test_mnist_has_5000_digits() -> None:
    found = load("mnist")
    assert found.images.shape == (4000, 1, 28, 28) and found.test_images.shape == (1000, 1, 28, 28)


def test_cifar10_is_read_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    part = pickle.dumps({"data": pixels, "labels": list(range(10))})
    for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]:
        (folder / name).write_bytes(part)
    names = pickle.dumps({"label_names": [str(label) for label in range(10)]})
    (folder / CIFAR10.meta["filename"]).write_bytes(names)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).exists())
    found = load("cifar10", tmp_path)
    assert found.images.shape == (50, 3, 32, 32) and found.test_images.shape == (10, 3, 32, 32)
    expected = torch.from_numpy(pixels).view(10, 3, 32, 32).float()
    spread = found.test_images * expected.std((0, 2, 3), keepdim=True) + expected.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(spread, expected, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize(
    ("name", "root", "message"),
    [
        ("cifar", None, "--data must be one of digits, mnist, cifar10, got 'cifar'"),
        ("cifar10", None, "--data cifar10 needs --data-root"),
        ("cifar10", "nowhere", r"--data-root must be a folder with CIFAR-10 \(cifar-10-batches-py\), got 'nowhere'"),
    ],
)
def test_missing_data_is_said_in_one_sentence(name: str, root: str | None, message: str) -> None:
    with pytest.raises(AnalysisError, match=message):
        load(name, None if root is None else Path(root))


def test_a_missing_package_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(AnalysisError, match=r"analyze needs sklearn: pip install 'fusedres\[analysis\]'"):
        data_module.load("digits")


def test_rates_warm_up_and_fall_to_zero() -> None:
    recipe = Recipe(epochs=1, learning_rate=0.4, warm_up=0.25)
    assert [recipe.rate(share) for share in (0.0, 0.125, 0.25)] == [0.0, 0.2, 0.4]
    assert recipe.rate(0.625) == pytest.approx(0.2) and recipe.rate(1.0) == pytest.approx(0.0)


def test_intervals_are_students() -> None:
    found = mean([1.0, 2.0, 3.0])
    assert (found.value, found.half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert mean([1.0]).half is None
    assert json.dumps(str(mean([1.0]))) == '"1"'
