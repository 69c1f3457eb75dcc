"""The networks for CIFAR: parameter counts of the papers, and the numbers of the same networks in plain torch."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import Values
from tolerance import check_model
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres import models
from fusedres.autograd import path_counts

# In millions, of table 6 of He et al. 2015 and of He et al. 2016.
PAPER = {
    "resnet20": 0.27, "resnet32": 0.46, "resnet44": 0.66, "resnet56": 0.85, "resnet110": 1.7, "preact_resnet110": 1.7,
    "preact_resnet164": 1.7,
}  # fmt: skip
BLOCKS = {"resnet20": 9, "plain20": 9, "preact_resnet20": 9, "preact_resnet164": 54, "preact_resnet1001": 333}


@pytest.mark.parametrize("name", PAPER)
def test_parameters_of_the_papers(name):
    count = sum(p.numel() for p in getattr(models, name)().parameters()) / 1e6
    digits = 1 if PAPER[name] >= 1 else 2
    assert round(count, digits) == PAPER[name]


def test_parameters_by_hand():
    """Of ResNet-20: 3·16·9, six 3x3 of 16, then 16·32 and 32·64 with five each, BatchNorms, and the classifier."""
    stages = 6 * 16 * 16 + (16 + 5 * 32) * 32 + (32 + 5 * 64) * 64
    norms = 2 * (16 + 6 * 16 + 6 * 32 + 6 * 64)
    padded = 9 * (3 * 16 + stages) + norms + 64 * 10 + 10

    def count(model: nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    projections = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    every = 3 * (16 * 16 + 2 * 16) + 2 * (32 * 32 + 2 * 32) + 2 * (64 * 64 + 2 * 64) + projections
    assert count(models.resnet20()) == count(models.plain20()) == padded
    assert count(models.resnet20("B")) == padded + projections
    assert count(models.resnet20("C")) == padded + every


def _shortcut(block: nn.Module, x: Tensor) -> Tensor:
    return x if block.downsample is None else block.downsample(x)


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of a network by torch's own operators."""
    preact = model.preactivated
    x = model.conv1(x)
    x = x if preact else F.relu(model.tail.norm(x))
    for block in (*model.layer1, *model.layer2, *model.layer3):
        if preact:
            a = F.relu(block.bn1(x))
            h = block.conv2(F.relu(block.bn2(block.conv1(a))))
            h = block.conv3(F.relu(block.bn3(h))) if hasattr(block, "conv3") else h
            x = h + (x if block.downsample is None else block.downsample(a))
        else:
            h = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
            x = F.relu(h if isinstance(block, fusedres.PlainBlock) else h + _shortcut(block, x))
    x = F.relu(model.tail.norm(x)) if preact else x
    return model.fc(x.mean((2, 3)))


def _step(model: nn.Module, forward, x: Tensor, target: Tensor) -> Values:
    model.zero_grad(set_to_none=True)
    logits = forward(x)
    F.cross_entropy(logits, target).backward()
    found: Values = {"logits": logits.detach()}
    found |= {f"grad.{name}": p.grad for name, p in model.named_parameters()}
    return found | {f"stats.{name}": buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(
    "make",
    [
        models.resnet20, lambda: models.resnet20("B"), lambda: models.resnet20("C"), models.preact_resnet20,
        models.plain20, lambda: models.cifar.CifarNetwork(
            lambda i, p, s: fusedres.PreActBottleneck(
                i, p, s, nn.Conv2d(i, 4 * p, 1, s, bias=False) if i != 4 * p else None
            ), 2, 10, 4, True
        ),
    ],
    ids=["A", "B", "C", "preact", "plain", "bottleneck"],
)  # fmt: skip
def test_numbers_of_plain_torch(make):
    """In float64, where no ReLU flips; float32 is judged block by block elsewhere."""
    model = make().double().to(memory_format=torch.channels_last)
    stock = copy.deepcopy(model)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64).to(memory_format=torch.channels_last)
    target = torch.tensor([0, 3, 9])
    before = path_counts["unfused"] + path_counts["tail_unfused"] + path_counts["norm_act_conv_unfused"]
    ours = _step(model, model, x, target)
    assert path_counts["unfused"] + path_counts["tail_unfused"] + path_counts["norm_act_conv_unfused"] == before
    theirs = _step(stock, lambda v: _forward(stock, v), x, target)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), _forward(stock.eval(), x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", BLOCKS)
def test_report_has_every_block(name):
    rows = fusedres.report(getattr(models, name)())
    assert len(rows) == BLOCKS[name] + 1 and all(row.fused for row in rows)  # and the norm of the stem, or at the end


def test_float32_step():
    model = models.resnet20()
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    x, target = torch.randn(4, 3, 16, 16), torch.tensor([0, 3, 9, 1])
    theirs = _step(stock, lambda v: _forward(stock, v), x, target)
    right = _step(exact, lambda v: _forward(exact, v), x.double(), target)
    stats = [name for name in right if name.startswith("stats.tail") or name == "logits"]  # before any ReLU flips
    ours = _step(model, model, x, target)
    check_model(*({name: run[name] for name in stats} for run in (ours, theirs, right)), torch.float32, "resnet20")


def test_highway_network():
    network = models.HighwayNetwork(10, 64)
    x = torch.randn(5, 1, 8, 8)
    assert network(x).shape == (5, 10)
    assert sum(p.numel() for p in network.parameters()) == 64 * 50 + 50 + 8 * 2 * (50 * 50 + 50) + 50 * 10 + 10
    h = F.relu(network.first(x.flatten(1)))
    for layer in network.layers:
        t = torch.sigmoid(layer.gate(h))
        h = t * F.relu(layer.transform(h)) + (1 - t) * h
    torch.testing.assert_close(network(x), network.classifier(h))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: models.resnet20("D"), "shortcut must be one of A, B, C"),
        (lambda: models.CifarNetwork(fusedres.PlainBlock, 0), "blocks must be at least 1"),
        (lambda: models.HighwayNetwork(1, 64), "depth must be at least 2"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
