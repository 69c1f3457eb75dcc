"""Training for the experiments: the same result from the same seed, also after a kill, and nothing else is touched."""

from __future__ import annotations

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
from fusedres.analysis.shortcuts import ScaledShortcut
from fusedres.analysis.training import Recipe, settings_of, train
from fusedres.analysis.work import Run, Work, remove

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
        self.steps: list[int] = []

    def update(self, n: float | None = 1) -> bool | None:
        self.steps.append(int(n or 0))
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


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_killed_run_goes_on_to_the_same_result(
    epochs: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    expected = trained(data, Work(None, {}))
    with Work(tmp_path, {"a": 1}) as work, pytest.raises(KilledError):
        trained(data, work, Bar(epochs))
    again = Bar()
    with Work(tmp_path, {"a": 1}) as work:
        assert trained(data, work, again) == expected
    assert again.steps == [epochs - 1, *[1] * (RECIPE.epochs - epochs + 1)]  # the first is what was done before


def test_a_checkpoint_of_other_settings_does_not_count(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with Work(tmp_path, {"a": 1}) as work, pytest.raises(KilledError):
        trained(data, work, Bar(3))
    again = Bar()
    with Work(tmp_path, {"a": 2}) as work:
        trained(data, work, again)
    assert again.steps == [1] * RECIPE.epochs


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with Work(tmp_path, {}), pytest.raises(AnalysisError, match="one process at a time can work in"):
        Work(tmp_path, {})
    Work(tmp_path, {}).close()


def test_a_finished_run_is_not_repeated(data: Data, tmp_path: Path) -> None:
    with Work(tmp_path, {}) as work:
        expected = trained(data, work)

    def fails() -> nn.Module:
        raise AssertionError

    assert train("net", fails, data, RECIPE, 0, Work(tmp_path, {}), Bar()) == (expected, None)


def test_weights_are_kept_where_they_are_needed(data: Data, tmp_path: Path) -> None:
    with Work(tmp_path, {}, keeps_weights=True) as work:
        first = train("net", network, data, RECIPE, 0, work, Bar())[1]
        again = train("net", network, data, RECIPE, 0, work, Bar())[1]
    assert first is not None and again is not None and not again.training
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))


def test_settings_see_every_difference(data: Data) -> None:
    def settings(
        data: Data, recipe: Recipe = RECIPE, factor: float = 0.5, dtype: torch.dtype = torch.float32
    ) -> object:
        def layers() -> nn.Module:
            return nn.Sequential(nn.Flatten(), ScaledShortcut(factor), nn.Linear(192, 3)).to(dtype)

        return settings_of(data._replace(images=data.images.to(dtype)), recipe, {"net": layers})

    expected = settings(data)
    assert settings(data) == expected
    assert settings(data, factor=0.4) != expected
    assert settings(data, dtype=torch.float64) != expected
    assert settings(data, RECIPE._replace(epochs=5)) != expected
    assert settings(data._replace(images=data.images + 1)) != expected
    assert settings(data.first(100)) != expected


def test_other_settings_start_again(data: Data, tmp_path: Path) -> None:
    with Work(tmp_path, {"seeds": 1}) as work:
        trained(data, work)
    for seeds in (1, 2):
        with Work(tmp_path, {"seeds": seeds}) as work:
            assert (work.run("net, seed 0") is not None) == (seeds == 1)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\x00", b'{"made_by": 3}', b'{"made_by": 3, "runs": {"a": 1}}'])
def test_damaged_files_start_again(content: bytes, data: Data, tmp_path: Path) -> None:
    expected = trained(data, Work(None, {}))
    for path in (tmp_path / "fusedres-runs.json", tmp_path / "fusedres-checkpoint.pt"):
        path.write_bytes(content)
    with Work(tmp_path, {}) as work:
        assert trained(data, work) == expected


def test_only_files_of_training_are_removed(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    mine = {"checkpoint.pt", "runs.json", "weights of mine.pt", ".mine.unfinished"}
    for name in mine:
        (tmp_path / "a" / "b" / name).write_text("x")
    Work(tmp_path / "a" / "b", {}).close()
    (tmp_path / "a" / "b" / ".fusedres-checkpoint.pt.0123.unfinished").write_text("x")
    remove(tmp_path / "a" / "b")
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == mine
    assert all((tmp_path / "a" / "b" / name).read_text() == "x" for name in mine)
    for name in mine:
        (tmp_path / "a" / "b" / name).unlink()
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
        ("cifar", None, "name must be one of digits, mnist, cifar10, got 'cifar'"),
        ("cifar10", None, "load: cifar10 needs root"),
        (
            "cifar10",
            "nowhere",
            r"\(--data-root\) must be a folder with CIFAR-10 \(cifar-10-batches-py\), got 'nowhere'",
        ),
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
    assert mean([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert mean([1.0]) == (1.0, None)
