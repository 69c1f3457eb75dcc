"""Whole ResNets: fused against stock, forward and backward, with the same weights.

Rounding errors grow through dozens of layers, so eager's own errors, against the float64 model, set the scale: in
float32 the errors of the stock model, in float64 those of the stock model in the other memory format.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from fusion import FORMATS, MEMORY, expect_paths, label
from reference import Values, randomize, run, separate
from tolerance import check_model
from torch import Tensor, nn
from torchvision.models import ResNet, resnet18, resnet34, resnet50
from torchvision.models.resnet import Bottleneck

import fusedres

NCHW, NHWC = FORMATS
MODELS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
# ResNeXt-50 (32x4d) and Wide ResNet-50-2 with one block per stage, but the original groups and widths.
OTHERS = {
    "resnext": partial(ResNet, Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
    "wide_resnet": partial(ResNet, Bottleneck, [1, 1, 1, 1], width_per_group=128),
}
BLOCKS = {"resnet18": 8, "resnet34": 16, "resnet50": 16, "resnext": 4, "wide_resnet": 4}
# float32 in every mode. float64 runs the same code with tighter bounds, only in the cheapest modes.
RUNS = [(name, torch.float32, memory, training) for name in MODELS for memory in MEMORY for training in (True, False)]
RUNS += [("resnet18", torch.float64, memory, training) for memory in MEMORY for training in (True, False)]
RUNS += [("resnet50", torch.float64, "min", True)]


def stock_model(make: Callable[..., ResNet], training: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a float32 model, an input for which no pre-activation lies near zero, and a gradient of the output."""
    model = make(num_classes=10)
    randomize(model, 1)
    for child in model.modules():
        if isinstance(child, nn.BatchNorm2d):
            nn.init.constant_(child.weight, 1.0)
    for block in model.modules():  # make branches smaller than their shortcuts, as in trained networks
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if last is not None:
            nn.init.constant_(last.weight, 0.3)
    model.train(training)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 64, 64, generator=generator)
    separate(model, x)
    return model, x, torch.randn(2, 10, generator=generator)


@cache
def prepared(name: str, training: bool) -> tuple[nn.Module, Tensor, Tensor, Values]:
    model, x, grad = stock_model((MODELS | OTHERS)[name], training)
    exact = copy.deepcopy(model).double()
    return model, x, grad, run(exact, x.double(), grad.double())


@pytest.mark.parametrize(("name", "dtype", "memory", "training"), RUNS, ids=label)
def test_outputs_gradients_and_statistics(name: str, dtype: torch.dtype, memory: str, training: bool) -> None:
    model, x, grad, exact = prepared(name, training)
    model = copy.deepcopy(model).to(dtype=dtype, memory_format=NHWC)
    x, grad = x.to(dtype=dtype, memory_format=NHWC), grad.to(dtype)
    twin = fusedres.fuse(copy.deepcopy(model), memory=memory)
    eager = run(model, x, grad)
    with expect_paths(fused_forward=BLOCKS[name], fused_backward=BLOCKS[name], stem_forward=1, stem_backward=1):
        got = run(twin, x, grad)
    check_model(got, eager, exact, dtype, name)


def test_nchw_input_gives_the_same_numbers() -> None:
    model, x, grad, exact = prepared("resnet18", True)
    twin = fusedres.fuse(copy.deepcopy(model))
    check_model(run(twin, x, grad), run(copy.deepcopy(model), x, grad), exact, torch.float32, "NCHW")


@pytest.mark.parametrize("name", OTHERS)
def test_grouped_and_wide_models(name: str) -> None:
    model, x, grad, exact = prepared(name, True)
    model = copy.deepcopy(model).to(memory_format=NHWC)
    x = x.to(memory_format=NHWC)
    twin = fusedres.fuse(copy.deepcopy(model))
    assert len(fusedres.report(twin)) == BLOCKS[name] + 1
    check_model(run(twin, x, grad), run(model, x, grad), exact, torch.float32, name)


def test_a_model_built_of_fused_blocks_is_the_stock_model() -> None:
    model, x, grad, exact = prepared("resnet18", True)
    built = fusedres.FusedResNet(fusedres.FusedBasicBlock, [2, 2, 2, 2], num_classes=10)
    built.load_state_dict(model.state_dict(), strict=True)
    check_model(run(built, x, grad), run(copy.deepcopy(model), x, grad), exact, torch.float32, "built")


def test_frozen_batch_norm_fine_tuning() -> None:
    """BatchNorms are in eval mode, the first layers need no gradients, and the rest is trained for two steps."""
    results = []
    for fused in (True, False):
        model, x, grad, _ = prepared("resnet18", True)
        model = copy.deepcopy(model).double().to(memory_format=NHWC)
        for child in model.modules():
            if isinstance(child, nn.BatchNorm2d):
                child.eval()
        for part in (model.conv1, model.bn1, model.layer1):
            part.requires_grad_(False)
        if fused:
            fusedres.fuse(model)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-3, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(x.double().to(memory_format=NHWC)).backward(grad.double())
            optimizer.step()
        results.append(dict(model.state_dict()))
        assert all(p.grad is None for p in model.layer1.parameters())
    mine, stock = results
    for name, value in stock.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("memory", MEMORY)
def test_deterministic_algorithms_are_bitwise_repeatable(memory: str) -> None:
    model, x, grad, _ = prepared("resnet18", True)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(fusedres.fuse(copy.deepcopy(model), memory=memory), x, grad) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
