"""A ResNet that is its stem alone, and what the tests of the fused stem share.

The layers, the average pool and the classifier of the ResNet are identities. Inputs and weights of the convolution are
small integers, so that its output is exact in every dtype, and each pooling window has the same maximum in all of them.
"""

from __future__ import annotations

import copy

import pytest
import torch
from eager import trust
from fusion import FORMATS
from reference import randomize, separate, set_mode
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres

NCHW, NHWC = FORMATS
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUSED = {"stem_forward": 1, "stem_backward": 1}


def stem(
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = NCHW,
    mode: str = "train",
    size: tuple[int, int] = (15, 18),
    channels: tuple[int, int] = (3, 19),
    **norm: object,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a stock model that is its stem alone, a batch of images, and a gradient of its flat output."""
    with torch.device("meta"):
        model = ResNet(BasicBlock, [1, 1, 1, 1])
    for name in ("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
        setattr(model, name, nn.Identity())
    model.conv1 = nn.Conv2d(*channels, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(channels[1], **norm)  # type: ignore[arg-type]
    randomize(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.conv1.weight.copy_(torch.randint(-1, 2, model.conv1.weight.shape, generator=generator))
    x = torch.randint(-2, 3, (4, channels[0], *size), generator=generator).to(dtype).to(memory_format=memory_format)
    model = set_mode(model.to(dtype=dtype, memory_format=memory_format), mode)
    if model.bn1.bias is not None:
        separate(model, x)
    trust(model, x)
    return model, x, torch.randn(shape_of(model, x), generator=generator).to(dtype)


def shape_of(model: nn.Module, x: Tensor) -> torch.Size:
    with torch.no_grad():
        return copy.deepcopy(model)(x).shape


def twin_of(model: nn.Module, conv: str = "auto") -> nn.Module:
    twin = fusedres.fuse(copy.deepcopy(model), conv=conv)
    if conv == "fused":  # fuse(conv="fused") does not concern the stem
        twin.fused_conv = conv
    assert [row.fused for row in fusedres.report(twin)] == [True]
    return twin


def off_the_interpreter(backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors need Triton's interpreter, which is off because there is a GPU")


class Listing(TorchDispatchMode):
    """Collects the operators that ran, and the output masks of convolution_backward."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ran.add(func._schema.name)
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[10]))
        return func(*args, **(kwargs or {}))
