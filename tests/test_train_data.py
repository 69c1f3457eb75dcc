"""The data of examples/train.py: splits, augmentation, and folders of images."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the handwritten digits come with scikit-learn")
pytest.importorskip("matplotlib", reason="the curves are drawn with matplotlib")
pytest.importorskip("tqdm", reason="the progress bar is tqdm's")


def test_augmentation_depends_on_seed_epoch_and_image_only(example: SimpleNamespace, image_folder: Path) -> None:
    for name in ("digits", str(image_folder)):
        data = example.data.load_data(name, root=Path(), download=False, size=None, holdout=0.2, split_seed=0)
        picked = data.train_indices[:20]

        def images(seed: int, epoch: int, order: list[int], data: Any = data) -> dict[int, torch.Tensor]:
            view = example.data.View(data.train, (seed, epoch))
            return {i: view[i][0] for i in order}

        one, reverse = images(1, 2, picked), images(1, 2, picked[::-1])
        assert all(torch.equal(one[i], reverse[i]) for i in picked)
        for other in (images(1, 3, picked), images(2, 2, picked)):
            assert sum(not torch.equal(one[i], other[i]) for i in picked) > 10
        plain = example.data.View(data.train)
        assert plain[0][0].shape == (data.channels, data.size, data.size)
        assert torch.equal(plain[0][0], plain[0][0])


def test_digits_split_is_fixed_stratified_and_disjoint(example: SimpleNamespace) -> None:
    loads = [
        example.data.load_data("digits", root=Path(), download=False, size=8, holdout=0.2, split_seed=seed)
        for seed in (0, 0, 1)
    ]
    data, same, other = loads
    assert data.train_indices == same.train_indices
    assert data.test_indices == same.test_indices != other.test_indices
    assert not set(data.train_indices) & set(data.test_indices)
    assert sorted(data.train_indices + data.test_indices) == list(range(1797))
    for digit in range(10):
        members = data.train.labels.count(digit)
        held = sum(data.test.labels[i] == digit for i in data.test_indices)
        assert abs(held - 0.2 * members) <= 0.5


def test_cifar10_has_its_own_test_set_and_mirrors(example: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with ten images replaces torchvision's class; no files are read."""

    def stand_in(root: str, train: bool, download: bool) -> SimpleNamespace:
        assert not download
        pixels = np.random.default_rng(int(train)).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
        return SimpleNamespace(data=pixels, targets=list(range(10)))

    monkeypatch.setattr(example.data.torchvision.datasets, "CIFAR10", stand_in)
    data = example.data.load_data("cifar10", root=Path(), download=False, size=None, holdout=0.2, split_seed=0)
    assert (data.classes, data.channels, data.size) == (10, 3, 32)
    assert data.train_indices == data.test_indices == list(range(10))
    pixels = torch.from_numpy(stand_in("", True, False).data).permute(0, 3, 1, 2).double() / 255
    expected = (pixels - pixels.mean((0, 2, 3), keepdim=True)) / pixels.std((0, 2, 3), keepdim=True)
    plain = torch.stack([data.train.image(i, None) for i in range(10)])
    torch.testing.assert_close(plain.double(), expected, rtol=1e-5, atol=1e-5)
    # Every augmented image is a shifted window of the padded image, and about half of them are mirrored.
    mirrored = 0
    for key in range(40):
        got = data.train.image(0, np.random.default_rng(key))
        windows = torch.nn.functional.pad(data.train.pixels[0], (4,) * 4).unfold(1, 32, 1).unfold(2, 32, 1)
        windows = (windows.permute(1, 2, 0, 3, 4) - data.train.mean) / data.train.std
        straight = bool((windows == got).flatten(2).all(-1).any())
        flipped = bool((windows.flip(-1) == got).flatten(2).all(-1).any())
        assert straight != flipped
        mirrored += flipped
    assert 8 < mirrored < 32


def test_folder_with_its_own_held_out_images(example: SimpleNamespace, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train").symlink_to(image_folder)
    (tmp_path / "val").symlink_to(image_folder)
    data = example.data.load_data(str(tmp_path), root=Path(), download=False, size=16, holdout=0.2, split_seed=0)
    assert data.train_indices == data.test_indices == list(range(120))
    assert data.test.image(0, None).shape == (3, 16, 16)
