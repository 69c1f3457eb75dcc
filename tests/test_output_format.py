"""Every layer of a fused network has the same strides as unfused, also if strides do not determine a format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18, resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres
from fusedres.autograd import suggests_channels_last

NCHW, NHWC = torch.contiguous_format, torch.channels_last


def network(channels: int = 3, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet(options.pop("block", BasicBlock), [1, 1, 1, 1], num_classes=4, **options)
    if channels != 3:
        model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    return model


def single(block: type, *sizes: Any, projection: tuple[int, int] | None = None) -> nn.Module:
    torch.manual_seed(0)
    downsample = None
    if projection is not None:
        downsample = nn.Sequential(nn.Conv2d(*projection, 1, bias=False), nn.BatchNorm2d(projection[1]))
    return nn.Sequential(block(*sizes, 1, downsample))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet18": (resnet18, (2, 3, 40, 40)),
    "resnet50": (resnet50, (2, 3, 33, 33)),
    "one channel": (lambda: network(1), (2, 1, 40, 36)),
    "one channel, one image": (lambda: network(1), (1, 1, 40, 36)),
    "one image": (lambda: network(3), (1, 3, 64, 48)),
    "ends at one pixel": (lambda: network(3, block=Bottleneck), (2, 3, 16, 16)),
    "blocks of one channel": (lambda: single(BasicBlock, 1, 1), (3, 1, 5, 4)),
    "one channel, one image, one row": (lambda: single(BasicBlock, 1, 1), (1, 1, 1, 7)),
    "one to many": (lambda: single(BasicBlock, 1, 8, projection=(1, 8)), (3, 1, 5, 4)),
    "many to one": (lambda: single(BasicBlock, 8, 1, projection=(8, 1)), (3, 8, 5, 4)),
    "bottleneck of one": (lambda: single(Bottleneck, 4, 1), (2, 4, 6, 5)),
    "one pixel": (lambda: single(BasicBlock, 8, 8), (3, 8, 1, 1)),
    "one pixel, one channel": (lambda: single(BasicBlock, 1, 1), (5, 1, 1, 1)),
    "one pixel, bottleneck of one": (lambda: single(Bottleneck, 4, 1), (5, 4, 1, 1)),
}


def as_view(x: Tensor, how: str) -> Tensor:
    if how == "cropped":
        wide = torch.zeros(x.shape[0], x.shape[1], x.shape[2] + 2, x.shape[3] + 2).to(memory_format=NHWC)
        return wide[:, :, 1:-1, 1:-1].copy_(x)
    if how == "batch first of more":
        return torch.cat([x, x]).to(memory_format=NHWC)[::2][: x.shape[0]]
    if how == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous(memory_format=NHWC if how == "nhwc" else NCHW)


def strides(model: nn.Module, x: Tensor, recorded: bool) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Return name, shape and strides of the output of every block, of every layer and of the network."""
    seen = []
    handles = [
        child.register_forward_hook(lambda _m, _i, out, name=name: seen.append((name, tuple(out.shape), out.stride())))
        for name, child in model.named_modules()
        if isinstance(child, (BasicBlock, Bottleneck, ResNet)) or (name.startswith("layer") and name.count(".") == 0)
    ]
    with torch.set_grad_enabled(recorded):
        model(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("weights", ["nchw", "nhwc"])
@pytest.mark.parametrize("how", ["nchw", "nhwc", "cropped", "batch first of more", "transposed"])
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_the_strides_of_eager(name: str, how: str, weights: str) -> None:
    make, size = MODELS[name]
    model = make().to(memory_format=NHWC if weights == "nhwc" else NCHW)
    twin = fusedres.fuse(copy.deepcopy(model))
    x = as_view(torch.randn(size), how)
    for train, recorded in ((True, True), (True, False), (False, True), (False, False)):
        if train and size[0] * size[2] * size[3] < 3:
            continue
        expected = strides(model.train(train), x, recorded)
        assert strides(twin.train(train), x, recorded) == expected
    with torch.no_grad():
        assert strides(fusedres.freeze(twin), x, False) == expected


@pytest.mark.parametrize("memory", ["auto", "min"])
@pytest.mark.parametrize("weights", [NCHW, NHWC])
@pytest.mark.parametrize("images", [NCHW, NHWC])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradients_of_weights_have_the_strides_of_eager(
    backend: str, images: torch.memory_format, weights: torch.memory_format, memory: str
) -> None:
    """DistributedDataParallel compares them with those of the parameters, also where the kernel is 1x1.

    With NCHW weights on channels_last images eager's differ from those of the parameters; then either is right.
    """
    torch.set_num_threads(2)  # on one thread torch takes other convolutions, which hide the difference
    model = network(block=Bottleneck).to(memory_format=weights)
    twin = fusedres.fuse(copy.deepcopy(model), memory=memory)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=images)
    with fusedres.use_backend(backend):
        for each in (model, twin):
            each(x).square().sum().backward()
    for (name, stock), parameter in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert stock.grad is not None and parameter.grad is not None
        right = {stock.grad.stride()} | ({parameter.stride()} if (images, weights) == (NHWC, NCHW) else set())
        assert parameter.grad.stride() in right, name


def test_every_stride_is_taken_as_torch_takes_it() -> None:
    """torch.empty_like of a tensor has the format that torch suggests for it."""
    sizes = (1, 2, 3)
    for n, c, h, w in [(n, c, h, w) for n in sizes for c in sizes for h in sizes for w in sizes]:
        x = torch.zeros(2 * n, 2 * c, 2 * h, 2 * w)
        for memory_format in (NCHW, NHWC):
            whole = x.contiguous(memory_format=memory_format)
            views = [whole[:n, :c, :h, :w], whole[::2, ::2, ::2, ::2], whole[:n, :c, :h, :w].contiguous()]
            views += [torch.zeros(n, c, h, w).contiguous(memory_format=NHWC), whole[:1, :1, :1, :1].expand(n, c, h, w)]
            for view in views:
                weight = torch.zeros(2, view.shape[1], 1, 1)  # NCHW; ambiguous with one channel
                out = torch.conv2d(view, weight)
                by_strides = suggests_channels_last(view) or suggests_channels_last(weight)
                expected = out.is_contiguous(memory_format=NHWC) and not out.is_contiguous()
                if out.is_contiguous(memory_format=NHWC) != out.is_contiguous():
                    assert by_strides == expected, (view.shape, view.stride())


def test_gradients_are_dense_whatever_the_formats() -> None:
    for shape in ((2, 1, 5, 4), (1, 8, 1, 1), (3, 8, 1, 1)):
        for memory_format in (NCHW, NHWC):
            block = single(BasicBlock, shape[1], shape[1]).eval()
            twin = fusedres.fuse(copy.deepcopy(block))
            x = torch.randn(shape).contiguous(memory_format=memory_format)
            grads = [
                torch.autograd.grad(m(y := x.clone().requires_grad_()).square().sum(), y)[0] for m in (block, twin)
            ]
            torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)
            assert grads[1].is_contiguous() or grads[1].is_contiguous(memory_format=NHWC)
