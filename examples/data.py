"""Images for train.py: handwritten digits, CIFAR-10 or a folder with one sub-folder for each class.

Augmentation draws from a generator seeded by (seed, epoch, index of the image). So an image looks the same in a given
epoch, no matter which worker loads it and where a resumed run starts.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from shared import files
from torch import Tensor
from torchvision.transforms import functional as TF

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DEFAULT_SIZE = {"digits": 8, "cifar10": 32}
FOLDER_SIZE = 224
_LONGEST = 16  # the largest ratio of the sides of a held-out image; a longer image is cropped


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one sentence and says what to do instead."""


def shown(path: str | Path) -> str:
    """Return a path as one line of text, whatever characters it contains."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(path))


class Images(Protocol):
    """Images with labels; image() augments if a generator is given."""

    labels: list[int]

    def image(self, index: int, rng: np.random.Generator | None) -> Tensor:
        """One normalised image, (C, H, W) float32."""
        ...


@dataclass(frozen=True)
class Data:
    """A training set and a held-out set: their images, indices and classes."""

    name: str
    classes: int
    channels: int
    size: int
    train: Images
    train_indices: list[int]
    test: Images
    test_indices: list[int]


class View(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Dataset over images: augmented if (seed, epoch) is given, otherwise plain."""

    def __init__(self, images: Images, seed_and_epoch: tuple[int, int] | None = None) -> None:
        self.images, self.seed_and_epoch = images, seed_and_epoch

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        key = self.seed_and_epoch
        rng = None if key is None else np.random.default_rng((*key, index))
        return self.images.image(index, rng), self.images.labels[index]

    def __len__(self) -> int:
        return len(self.images.labels)


class ArrayImages:
    """Images held in memory, pixels (N, C, H, W) in [0, 1]; augmented by shifts with zero fill and mirroring."""

    def __init__(
        self, pixels: Tensor, labels: Sequence[int], mean: Tensor, std: Tensor, shift: int, mirror: bool
    ) -> None:
        self.pixels, self.labels = pixels, list(labels)
        self.mean, self.std = mean.view(-1, 1, 1), std.view(-1, 1, 1)
        self.shift, self.mirror = shift, mirror

    def image(self, index: int, rng: np.random.Generator | None) -> Tensor:
        """Return the image; if rng is given, shifted by up to `shift` pixels and mirrored half of the time."""
        x = self.pixels[index]
        if rng is not None:
            top, left = (int(v) for v in rng.integers(0, 2 * self.shift + 1, 2))
            height, width = x.shape[-2:]
            x = F.pad(x, (self.shift,) * 4)[:, top : top + height, left : left + width]
            if self.mirror and rng.random() < 0.5:
                x = x.flip(-1)
        return (x - self.mean) / self.std


class FolderImages:
    """Images of a torchvision ImageFolder, decoded when asked for; augmented by a random resized crop and mirroring."""

    def __init__(self, folder: torchvision.datasets.ImageFolder, size: int) -> None:
        self.folder, self.size, self.labels = folder, size, [int(label) for label in folder.targets]

    def image(self, index: int, rng: np.random.Generator | None) -> Tensor:
        """Return a crop of 35-100% of the image if rng is given, otherwise its centre; (3, size, size)."""
        path = self.folder.samples[index][0]
        try:
            picture = _decoded(Path(path))
        except Exception as error:  # Pillow's decoders may raise anything for a broken file
            raise UsageError(f"{shown(path)} cannot be read as an image: repair or remove it") from error
        width, height = picture.size
        if rng is None:
            if max(width, height) > _LONGEST * min(width, height):  # a very thin image, scaled, would fill the memory
                side = _LONGEST * min(width, height)
                picture = TF.center_crop(picture, [min(height, side), min(width, side)])
            scaled = TF.resize(picture, [round(self.size * 256 / 224)])
            picture = TF.center_crop(scaled, [self.size, self.size])
        else:
            area, aspect = width * height * rng.uniform(0.35, 1.0), np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w = min(width, max(1, round(float(np.sqrt(area * aspect)))))
            h = min(height, max(1, round(float(np.sqrt(area / aspect)))))
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            picture = TF.resized_crop(picture, top, left, h, w, [self.size, self.size])
            if rng.random() < 0.5:
                picture = TF.hflip(picture)
        return TF.normalize(TF.to_tensor(picture), list(IMAGENET_MEAN), list(IMAGENET_STD))


def _decoded(path: Path) -> Any:
    """Return the image in RGB; a pipe instead of a file is refused without waiting for it."""
    with (
        files.opened(path) as descriptor,
        os.fdopen(descriptor, "rb", closefd=False) as file,
        Image.open(file) as found,
    ):
        picture = found.convert("RGB")
    if min(picture.size) < 1:
        raise ValueError(f"it has {picture.size} pixels")
    return picture


def stratified_split(labels: Sequence[int], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return indices (train, held out): `fraction` of each class is held out, at least one image, chosen by seed."""
    rng = np.random.default_rng(seed)
    array = np.asarray(labels)
    held: list[int] = []
    for label in np.unique(array):
        members = rng.permutation(np.flatnonzero(array == label))
        if len(members) < 2:
            raise UsageError(f"class {label} has one image: at least two are needed, one of them to hold out")
        held.extend(int(i) for i in members[: min(max(1, round(fraction * len(members))), len(members) - 1)])
    chosen = set(held)
    return [i for i in range(len(array)) if i not in chosen], sorted(held)


def _digits(size: int, holdout: float, split_seed: int) -> Data:
    """Return scikit-learn's 1,797 handwritten digits, 8x8 gray, enlarged bilinearly to size."""
    from sklearn.datasets import load_digits

    arrays: Any = load_digits()
    labels = [int(label) for label in arrays.target]
    x = torch.from_numpy(arrays.data).float().view(-1, 1, 8, 8) / 16
    if size != 8:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    train, test = stratified_split(labels, holdout, split_seed)
    mean, std = x[train].mean().view(1), x[train].std().view(1)
    images = ArrayImages(x, labels, mean, std, shift=max(1, size // 8), mirror=False)
    return Data("digits", 10, 1, size, images, train, images, test)


def _cifar10(root: Path, download: bool, size: int) -> Data:
    """Return torchvision's CIFAR-10 with its own test set."""
    sets = []
    for train in (True, False):
        try:
            sets.append(torchvision.datasets.CIFAR10(str(root), train=train, download=download))
        except Exception as error:  # OSError, RuntimeError, and whatever unpacking and unpickling raise
            remedy = "pass --data-root or --download" if not download else f"the download failed ({error})"
            raise UsageError(f"cifar10 is not complete under {shown(root)}: {remedy}") from error
    pixels = [torch.from_numpy(np.ascontiguousarray(s.data)).permute(0, 3, 1, 2).float() / 255 for s in sets]
    if size != 32:
        pixels = [F.interpolate(p, size=(size, size), mode="bilinear", antialias=True) for p in pixels]
    mean, std = pixels[0].mean((0, 2, 3)), pixels[0].std((0, 2, 3))
    shift = max(1, size // 8)
    train_set, test_set = (
        ArrayImages(p, s.targets, mean, std, shift=shift, mirror=True) for p, s in zip(pixels, sets, strict=True)
    )
    train_indices, test_indices = list(range(len(train_set.labels))), list(range(len(test_set.labels)))
    return Data("cifar10", 10, 3, size, train_set, train_indices, test_set, test_indices)


def _image_folder(path: Path) -> torchvision.datasets.ImageFolder:
    try:
        return torchvision.datasets.ImageFolder(str(path))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{shown(path)} must hold one sub-folder per class, each with images: {reason}") from error


def _folder(path: Path, size: int, holdout: float, split_seed: int) -> Data:
    """Return path/train with path/val or path/test if they exist, otherwise a split of path itself."""
    if not os.path.isdir(path):  # Path.is_dir raises for names that are too long
        raise UsageError(f"--data must be digits, cifar10 or a folder of images, and there is no folder {shown(path)}")
    held = next((path / name for name in ("val", "test") if os.path.isdir(path / name)), None)
    if os.path.isdir(path / "train") and held is not None:
        train_folder, test_folder = _image_folder(path / "train"), _image_folder(held)
        if train_folder.classes != test_folder.classes:
            raise UsageError(f"{shown(path / 'train')} and {shown(held)} must hold the same classes")
        train, test = list(range(len(train_folder))), list(range(len(test_folder)))
    else:
        train_folder = test_folder = _image_folder(path)
        train, test = stratified_split(train_folder.targets, holdout, split_seed)
    classes = len(train_folder.classes)
    return Data(
        path.name, classes, 3, size, FolderImages(train_folder, size), train, FolderImages(test_folder, size), test
    )


def load_data(name: str, *, root: Path, download: bool, size: int | None, holdout: float, split_seed: int) -> Data:
    """Return the data set called `name`, or of the folder with that path; raises UsageError if there is none."""
    if name == "digits":
        return _digits(size or DEFAULT_SIZE[name], holdout, split_seed)
    if name == "cifar10":
        return _cifar10(root, download, size or DEFAULT_SIZE[name])
    return _folder(Path(name), size or FOLDER_SIZE, holdout, split_seed)
