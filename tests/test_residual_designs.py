"""Scaled residuals, stochastic depth, plain, wide, ResNeXt and ResNet-D blocks, against plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torchvision
from family import check_equation, randomised
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

import fusedres
from fusedres import (
    AvgPoolShortcut,
    FusedBasicBlock,
    FusedBottleneck,
    LayerScale,
    PlainBlock,
    PreActBasicBlock,
    ResNeXtBottleneck,
    ReZero,
    SkipInit,
    StochasticDepth,
    WideBlock,
)
from fusedres.autograd import path_counts

C = 16


def _branch() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.ReLU(), nn.Conv2d(C, C, 3, padding=1, bias=False))


def _normed() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm2d(C), nn.SiLU(), nn.Conv2d(C, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, C, 3, padding=1, bias=False), nn.Dropout(0.0),
    )  # fmt: skip


def _set(block: nn.Module, value: float) -> nn.Module:
    nn.init.constant_(block.scale, value)
    return block


def _scaled(m: nn.Module, x: Tensor) -> Tensor:
    h = m.branch(x)
    h = h if m.tail.norm is None else m.tail.norm(h)
    return x + (m.scale.view(-1, 1, 1) if m.scale.dim() else m.scale) * h


def _plain(m: PlainBlock, x: Tensor) -> Tensor:
    return F.relu(m.bn2(m.conv2(F.relu(m.bn1(m.conv1(x))))))


def _wide(m: WideBlock, x: Tensor) -> Tensor:
    return x + m.conv2(F.relu(m.bn2(m.conv1(F.relu(m.bn1(x))))))


def _resnet(m: nn.Module, x: Tensor) -> Tensor:
    h = F.relu(m.bn1(m.conv1(x)))
    h = m.bn2(m.conv2(h))
    if hasattr(m, "conv3"):
        h = m.bn3(m.conv3(F.relu(h)))
    return F.relu(h + (x if m.downsample is None else m.downsample(x)))


def _depth(m: StochasticDepth, x: Tensor) -> Tensor:
    h = m.branch(x)
    h = x + (h if m.tail.norm is None else m.tail.norm(h))
    return h if m.tail.activation is None else F.relu(h)


DESIGNS = {
    "ReZero": (lambda: _set(ReZero(_branch()), 0.7), _scaled),
    "ReZero with BatchNorm": (lambda: _set(ReZero(_branch(), nn.BatchNorm2d(C)), 0.7), _scaled),
    "ReZero of norms": (lambda: _set(ReZero(_normed()), 0.7), _scaled),
    "SkipInit": (lambda: SkipInit(_branch(), 0.4), _scaled),
    "LayerScale": (lambda: LayerScale(_branch(), C, 0.3, nn.BatchNorm2d(C)), _scaled),
    "plain": (lambda: PlainBlock(C, 24, 2), _plain),
    "wide": (lambda: WideBlock(C, C), _wide),
    "ResNeXt": (lambda: ResNeXtBottleneck(C, 4, groups=4, base_width=64), _resnet),
    "ResNet-D": (lambda: FusedBasicBlock(C, 24, 2, AvgPoolShortcut(C, 24, 2)), _resnet),
    "ResNet-D bottleneck": (lambda: FusedBottleneck(C, 8, 2, AvgPoolShortcut(C, 32, 2)), _resnet),
    "no stochastic depth": (lambda: StochasticDepth(_branch(), 0.0, "row", nn.BatchNorm2d(C), nn.ReLU()), _depth),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", DESIGNS)
def test_equation(name, dtype, mode):
    make, equation = DESIGNS[name]
    block = randomised(make()).to(dtype).train(mode == "train")
    fused = path_counts["tail_unfused"] + path_counts["norm_act_conv_unfused"] + path_counts["unfused"]
    check_equation(block, equation, torch.randn(3, C, 8, 7).to(dtype).to(memory_format=torch.channels_last))
    now = path_counts["tail_unfused"] + path_counts["norm_act_conv_unfused"] + path_counts["unfused"]
    assert now == fused


@pytest.mark.parametrize("name", DESIGNS)
def test_gradients_numerically(name):
    block = randomised(DESIGNS[name][0]()).double()
    x = torch.randn(2, C, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: block(v), (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("make", [ReZero, SkipInit, lambda b: LayerScale(b, C, 0.0)])
def test_zero_residual_is_the_identity(make):
    block, x = make(_branch()), torch.randn(2, C, 5, 5, requires_grad=True)
    out = block(x)
    grad = torch.randn_like(out)
    assert torch.equal(out, x) and torch.equal(torch.autograd.grad(out, x, grad)[0], grad)


@pytest.mark.parametrize("name", ["ReZero", "ReZero of norms", "LayerScale", "no stochastic depth"])
def test_compiled_and_traced(name):
    block = randomised(DESIGNS[name][0]()).eval()
    x = torch.randn(2, C, 6, 6)
    want = block(x)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(x), want)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), want)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), want)
    torch.testing.assert_close(torch.func.jvp(block, (x,), (x,))[0], want)


def test_initial_values():
    assert ReZero(_branch()).scale.shape == () and ReZero(_branch()).scale == 0
    assert torch.equal(LayerScale(_branch(), C).scale, torch.full((C,), 1e-5))
    block = ResNeXtBottleneck(256, 64)
    assert block.conv2.groups == 32 and block.conv2.out_channels == 128  # 32x4d


def test_odd_sizes_of_resnet_d():
    block = randomised(FusedBasicBlock(C, 24, 2, AvgPoolShortcut(C, 24, 2)))
    check_equation(block, _resnet, torch.randn(2, C, 7, 9))
    assert len(AvgPoolShortcut(C, 24)) == 2  # no pool without a stride


@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("activation", [None, nn.ReLU()])
def test_stochastic_depth_is_torchvision_s(mode, activation):
    """The same survivors, drawn here by hand, give the same numbers."""
    block = StochasticDepth(_branch(), 0.5, mode, nn.BatchNorm2d(C), activation)
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        x = torch.randn(6, C, 5, 5)
        stock = copy.deepcopy(block)
        torch.manual_seed(seed + 100)
        out = block(x)
        torch.manual_seed(seed + 100)
        if mode == "row":
            kept = torch.empty((6, 1)).bernoulli_(0.5).view(6, 1, 1, 1) * 2
        else:
            kept = 2 * (torch.rand(()) >= 0.5)
        seen |= set(kept.flatten().tolist())
        if mode == "batch" and kept == 0:
            assert block.tail.norm.num_batches_tracked == stock.tail.norm.num_batches_tracked  # F did not run
            expected = x
        else:
            expected = x + kept * stock.tail.norm(stock.branch(x))
        torch.testing.assert_close(out, expected if activation is None else F.relu(expected), rtol=1e-4, atol=1e-5)
    assert seen == {0.0, 2.0}


def test_share_of_survivors():
    block = StochasticDepth(nn.Identity(), 0.25)
    kept = block(torch.zeros(4000, 1) + 1) - 1
    torch.manual_seed(0)
    theirs = stochastic_depth(torch.ones(4000, 1), 0.25, "row")
    torch.testing.assert_close(kept.unique(), theirs.unique())
    assert abs(kept.mean().item() - 1) < 0.05 and block.eval()(torch.ones(5, 1)).eq(2).all()


def test_dropped_samples_get_the_shortcut_s_gradient():
    block = StochasticDepth(_branch(), 0.5)
    x = torch.randn(8, C, 4, 4, requires_grad=True)
    out = block(x)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, grad)
    dropped = (out == x).flatten(1).all(1)
    assert 0 < dropped.sum() < 8
    assert torch.equal(got[dropped], grad[dropped]) and not torch.equal(got[~dropped], grad[~dropped])


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_fuse_with_stochastic_depth(mode):
    """In eval and with a rate of 0 the network is the stock one; in training it is the equation with the same draws."""
    model = torchvision.models.resnet18(num_classes=4)
    stock = copy.deepcopy(model)
    fusedres.fuse(model, stochastic_depth=0.5, stochastic_mode=mode)
    rates = [b.fused_stochastic_depth.rate for b in model.modules() if isinstance(b, FusedBasicBlock)]
    assert rates == [0.5 * (i + 1) / 8 for i in range(8)]
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), stock.eval()(x), rtol=1e-3, atol=1e-4)
    block, twin = model.train().layer4[0], stock.train().layer4[0]  # with a projection
    x = torch.randn(4, 256, 4, 4)
    for seed in range(4):
        torch.manual_seed(seed)
        out = block(x)
        torch.manual_seed(seed)
        rate = rates[6]
        if mode == "row":
            kept = (torch.empty((4, 1)).bernoulli_(1 - rate) / (1 - rate)).view(4, 1, 1, 1)
        else:
            kept = 0 if torch.rand(()).item() < rate else 1 / (1 - rate)
        branch = twin.bn2(twin.conv2(F.relu(twin.bn1(twin.conv1(x))))) if not isinstance(kept, int) else 0
        expected = F.relu(kept * branch + twin.downsample(x))
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
        out.sum().backward()
    assert all(row.fused for row in fusedres.report(model))
    fusedres.fuse(model)
    assert all(b.fused_stochastic_depth is None for b in model.modules() if isinstance(b, FusedBasicBlock))
    fusedres.fuse(model, stochastic_depth=0.1)
    fusedres.unfuse(model)
    assert "fused_stochastic_depth" not in model.layer1[0].__dict__


def test_wide_dropout():
    block = WideBlock(C, C, dropout=0.5)
    x = torch.randn(4, C, 6, 6)
    stock = copy.deepcopy(block)
    torch.manual_seed(1)
    out = block(x)
    torch.manual_seed(1)
    h = F.dropout(F.relu(stock.bn2(stock.conv1(F.relu(stock.bn1(x))))), 0.5)
    torch.testing.assert_close(out, stock.conv2(h) + x, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.eval()(x), _wide(stock.eval(), x), rtol=1e-4, atol=1e-5)
    assert isinstance(block, PreActBasicBlock) and block.fused_last_reason == ""


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: StochasticDepth(_branch(), -0.1), "rate must be at least 0"),
        (lambda: StochasticDepth(_branch(), 1.0), "rate must be at least 0"),
        (lambda: StochasticDepth(_branch(), 0.5, "column"), "mode must be"),
        (lambda: fusedres.fuse(nn.Sequential(), stochastic_depth=-1), "stochastic_depth must be at least 0"),
        (lambda: WideBlock(C, C, dropout=1.0), "dropout must be"),
        (lambda: LayerScale(_branch(), C + 1)(torch.randn(2, C, 4, 4)), "scale must be a scalar"),
        (lambda: ReZero(nn.Conv2d(C, 8, 1))(torch.randn(2, C, 4, 4)), "shortcut must have shape"),
        (lambda: FusedBasicBlock(C, 24, 2, AvgPoolShortcut(C, 25, 2))(torch.randn(2, C, 4, 4)), "shortcut must have"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def _hooked(block: nn.Module) -> nn.Module:
    block.relu.register_forward_hook(lambda *_: None)
    return fusedres.fuse(nn.Sequential(block), stochastic_depth=1 - 1e-9, stochastic_mode="batch")


@pytest.mark.parametrize(
    "make",
    [
        lambda: StochasticDepth(nn.Identity(), 1 - 1e-9, "batch", activation=nn.ReLU(inplace=True)),
        lambda: _hooked(torchvision.models.resnet.BasicBlock(C, C)),
    ],
)
def test_a_dropped_batch_stays_as_it_is(make):
    """An activation that works in place does not write into the input."""
    x = torch.randn(2, C, 4, 4, requires_grad=True)
    before = x.detach().clone()
    out = make()(x)
    assert torch.equal(x, before) and torch.equal(out, F.relu(before))
    out.sum().backward()
    assert torch.equal(x.grad, before.gt(0).float())


@pytest.mark.parametrize("mode", ["row", "batch"])
def test_survivors_of_float64_are_scaled_in_float64(mode):
    torch.manual_seed(0)
    block = StochasticDepth(nn.Identity(), 0.3, mode)
    x = torch.ones(64, 1, dtype=torch.float64)
    found = {value for _ in range(8) for value in (block(x) - 1).flatten().tolist()}
    assert len(found) == 2 and max(found) == pytest.approx(1 / 0.7, rel=1e-15)


class _Pooled(nn.Module):
    """A residual block with two activations, and a shortcut that is no convolution."""

    def __init__(self, shortcut: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C), nn.ReLU()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(h + self.shortcut(x))


def _act1(block: nn.Module) -> None:
    block.act1 = nn.SiLU()


def _hook(name: str) -> Callable[[nn.Module], None]:
    return lambda block: block.get_submodule(name).register_forward_hook(lambda _, __, out: 2 * out) and None


def _nothing(_: nn.Module) -> None:
    pass


@pytest.mark.parametrize("change", [_nothing, _act1, _hook("act1"), _hook("act2"), _hook("shortcut"), _hook("bn2")])
@pytest.mark.parametrize(
    "shortcut",
    [
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C)),
    ],
)
def test_stochastic_depth_of_registered_blocks(shortcut, change):
    """A rate of nearly 0 changes nothing, whatever was done to the block after fuse()."""
    fusedres.register(_Pooled)
    block = randomised(_Pooled(shortcut()))
    stock = copy.deepcopy(block)
    fusedres.fuse(nn.Sequential(block), stochastic_depth=1e-9)
    assert isinstance(block, fusedres.modules.FusedBlock)
    change(block)
    change(stock)
    x = torch.randn(3, C, 5, 5)
    torch.testing.assert_close(block(x), stock(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", [_Pooled, torchvision.models.resnet.BasicBlock])
def test_stochastic_depth_and_a_replaced_forward(monkeypatch, cls):
    fusedres.register(_Pooled)
    block = cls(nn.Identity()) if cls is _Pooled else cls(C, C)
    fusedres.fuse(nn.Sequential(block), stochastic_depth=0.5)
    monkeypatch.setattr(cls, "forward", lambda self, x: x + 1)
    x = torch.randn(3, C, 5, 5)
    assert torch.equal(block(x), x + 1)
    assert "is replaced" in fusedres.report(block)[0].reason


def test_stochastic_depth_without_a_block_that_drops():
    model = nn.Sequential(PreActBasicBlock(C, C))
    rates, blocks = "stochastic_depth has no effect", "its blocks need no fuse"
    with pytest.warns(UserWarning, match=blocks), pytest.warns(UserWarning, match=rates):
        fusedres.fuse(model, stochastic_depth=0.5)
