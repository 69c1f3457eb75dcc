"""Finds the distinct blocks and stems of torchvision's residual networks by running the networks on meta tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fusedres.modules import FusedBasicBlock, FusedBottleneck, FusedStem
from fusedres.modules.choice import shape_of
from fusedres.modules.parts import Parts
from fusedres.modules.resnet import parts_of_resnet


class Stem(nn.Module):
    """conv1, bn1, relu and maxpool of a ResNet."""

    def __init__(self, model: ResNet) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = model.conv1, model.bn1, model.relu, model.maxpool

    def forward(self, x: Tensor) -> Tensor:
        """Return maxpool(relu(bn1(conv1(x))))."""
        result: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return result


class FusedStemAlone(FusedStem, Stem):
    """The same stem, fused unless the device's table says otherwise."""

    def stem_parts(self) -> Parts:
        """Return where the parts of the stem are."""
        return parts_of_resnet(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same as Stem."""
        out = self.fused_stem(x)
        return super().forward(x) if out is None else out


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicBlock: FusedBasicBlock,
    Bottleneck: FusedBottleneck,
    Stem: FusedStemAlone,
}


@dataclass(frozen=True)
class Subject:
    """A stock block or stem on the meta device."""

    name: str
    module: nn.Module
    size: tuple[int, int, int]  # channels, height and width of an input

    @property
    def is_stem(self) -> bool:
        """Whether the inputs are images, which need no gradient."""
        return isinstance(self.module, Stem)

    @property
    def shape(self) -> tuple[str | int, ...]:
        """The fields of its dispatch.Shape from kind to width."""
        fused: Any = copy.copy(self.module)
        fused.__class__ = FUSED[type(self.module)]
        anatomy = fused.anatomy()
        assert not isinstance(anatomy, str), anatomy
        return shape_of(anatomy, torch.empty((1, *self.size), device="meta"))

    def build(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return a copy on a device, in channels_last, with random parameters and initial running statistics.

        For half precision the weights are float32, as under autocast.
        """
        module = copy.deepcopy(self.module).to_empty(device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            for child in module.modules():
                if isinstance(child, nn.Conv2d):
                    nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
                elif isinstance(child, nn.BatchNorm2d):
                    child.reset_running_stats()
                    nn.init.uniform_(child.weight, 0.5, 1.5)
                    nn.init.normal_(child.bias, 0.0, 0.2)
        module = module.to(torch.float64) if dtype is torch.float64 else module
        return module.to(memory_format=torch.channels_last)


def subjects(models: Sequence[str], image_size: int) -> list[Subject]:
    """Return the distinct blocks and stems of torchvision's models for images of this size, in order.

    Raises:
        ValueError: a name is not one of torchvision's residual networks.
    """
    found: dict[tuple[str | int, ...], Subject] = {}
    for name in models:
        for subject in _subjects(name, image_size):
            found.setdefault(subject.shape, subject)
    return list(found.values())


def _subjects(name: str, image_size: int) -> list[Subject]:
    try:
        with torch.device("meta"):
            model = torchvision.models.get_model(name)
    except ValueError as error:
        raise ValueError(f"tune: model must be one of torchvision's, such as resnet50, got {name!r}") from error
    if not isinstance(model, ResNet):
        raise ValueError(f"tune: model must be a residual network such as resnet50, got {name!r}")
    found = [Subject(f"{name}.stem", Stem(model), (3, image_size, image_size))]

    def note(block: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _, channels, height, width = inputs[0].shape
        found.append(Subject(f"{name}.{names[block]}", block, (channels, height, width)))

    names = {block: path for path, block in model.named_modules() if type(block) in FUSED}
    hooks = [block.register_forward_pre_hook(note) for block in names]
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    return found
