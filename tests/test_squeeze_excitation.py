"""Squeeze-and-excitation blocks against the equations of Hu et al. 2018 in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from family import check_equation, randomised, saved_bytes, values
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fusedres
from fusedres import SEBasicBlock, SEBottleneck, ZeroPadShortcut
from fusedres.autograd import path_counts
from fusedres.modules.postactivation import PostActBlock
from fusedres.modules.squeeze_excitation import Excitation


def _projection(inplanes: int, planes: int, *before: nn.Module, stride: int = 2) -> nn.Sequential:
    return nn.Sequential(*before, nn.Conv2d(inplanes, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))


BLOCKS = {
    "basic": lambda: SEBasicBlock(16, 16, reduction=4),
    "basic, projection": lambda: SEBasicBlock(16, 24, 2, _projection(16, 24), reduction=4),
    "basic, zero padding": lambda: SEBasicBlock(16, 32, 2, ZeroPadShortcut(16, 32, 2), reduction=8),
    "basic, pool": lambda: SEBasicBlock(16, 24, 2, _projection(16, 24, nn.AvgPool2d(2), stride=1), reduction=2),
    "basic, SiLU": lambda: SEBasicBlock(16, 16, reduction=4, activation=nn.SiLU()),
    "bottleneck": lambda: SEBottleneck(16, 4, reduction=4),
    "bottleneck, groups": lambda: SEBottleneck(16, 8, 2, _projection(16, 32), 4, 32, 4),
}


def _make(name: str) -> PostActBlock:
    return randomised(BLOCKS[name]())


def _equation(block: PostActBlock, x: Tensor) -> Tensor:
    act = nn.ReLU() if type(block.activation) is nn.ReLU else block.activation
    h = block.bn2(block.conv2(act(block.bn1(block.conv1(x)))))
    if isinstance(block, SEBottleneck):
        h = block.bn3(block.conv3(act(h)))
    p = F.adaptive_avg_pool2d(h, 1)
    s = torch.sigmoid(block.se.fc2(F.relu(block.se.fc1(p))))
    return act(s * h + (x if block.downsample is None else block.downsample(x)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_equation(name, dtype, mode):
    block = _make(name).to(dtype).train(mode == "train")
    x = torch.randn(3, 16, 8, 6).to(dtype).to(memory_format=torch.channels_last)
    before = path_counts["tail_backward"]
    check_equation(block, _equation, x)
    assert path_counts["tail_backward"] == before + 1
    assert block.fused_last_reason == ""


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_numerically(name, mode):
    block = _make(name).double().train(mode == "train")
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: block(v), (x, *block.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v, *_: block(v), (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("frozen", ["se", "bn", "x", "all but x"])
def test_partial_gradients(frozen):
    block = _make("basic, projection").double()
    for name, parameter in block.named_parameters():
        fixed = {"se": "se." in name, "bn": "bn" in name, "all but x": True}
        parameter.requires_grad_(not fixed.get(frozen, False))
    stock = copy.deepcopy(block)
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64, requires_grad=frozen != "x")
    got = torch.autograd.grad(block(x).sum(), [t for t in (x, *block.parameters()) if t.requires_grad])
    want = torch.autograd.grad(_equation(stock, x).sum(), [t for t in (x, *stock.parameters()) if t.requires_grad])
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast():
    block = _make("bottleneck")
    stock = copy.deepcopy(block)
    x = torch.randn(4, 16, 8, 8)
    ours = values(block, block, x, autocast=True)
    theirs = values(stock, lambda v: _equation(stock, v), x, autocast=True)
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        error = (ours[name].double() - tensor.double()).norm()  # rounding flips some ReLUs
        assert error <= 0.05 * tensor.double().norm(), name


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_zero_residual_is_the_identity(name):
    block = _make(name)
    last = block.bn2 if name == "basic" else block.bn3
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    x = torch.randn(2, 16, 5, 5).abs().requires_grad_()  # passes the ReLU
    out = block(x)
    grad = torch.randn_like(out)
    assert torch.equal(out, x) and torch.equal(torch.autograd.grad(out, x, grad)[0], grad)


def test_saves_what_the_gradients_need():
    block = _make("basic")
    x = torch.randn(4, 16, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    ours = saved_bytes(lambda: block(x), x, *block.parameters())
    theirs = saved_bytes(lambda: _equation(block, x), x, *block.parameters())
    small = 4 * (2 * 4 * 16 + 2 * 4 * 16)  # two states; means and factors of four samples
    assert ours <= 2 * x.nbytes + x.numel() // 8 + small
    assert ours < 0.5 * theirs


class _Written(TorchDispatchMode):
    """Notes where the branches are that a tail was written over."""

    def __init__(self):
        super().__init__()
        self.branches = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.fusedres.gated_tail_.default:
            self.branches.append(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", BLOCKS)
def test_inference_writes_over_the_branch(name, monkeypatch):
    """But neither over the block's input, nor over what a hook of a convolution has seen."""
    block = _make(name).eval()
    x = torch.randn(3, 16, 8, 6).to(memory_format=torch.channels_last)
    kept, want = x.clone(), _equation(block, x).detach()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, _Written() as written:
            assert block(x).data_ptr() in written.branches
        with context:
            torch.testing.assert_close(block(x), want)
        assert torch.equal(x, kept)
    seen = []
    conv = block.convs()[-1][1]
    conv.register_forward_hook(lambda module, given, out: seen.append((out, out.clone())))
    with torch.no_grad():
        torch.testing.assert_close(block(x), want)
    assert torch.equal(*seen[0])


def test_state_dict_is_torchvision_s():
    from torchvision.ops import SqueezeExcitation

    theirs = SqueezeExcitation(16, 4)
    block = _make("basic")
    block.se.load_state_dict(theirs.state_dict())
    h = torch.randn(2, 16, 5, 5)
    torch.testing.assert_close(h * block.se(h), theirs(h))


def test_unusual_blocks_run_as_they_are():
    x = torch.randn(2, 16, 6, 6)
    for change, reason in (
        (lambda b: b.se.fc1.register_forward_hook(lambda *_: None), "a hook on fc1"),
        (lambda b: setattr(b.se, "fc1", nn.Sequential(b.se.fc1)), "fc1 is no 1x1"),
        (lambda b: b.conv2.register_forward_hook(lambda *_: None), "a hook on conv2"),
        (lambda b: setattr(b, "bn2", nn.GroupNorm(4, 16)), "no kernel for GroupNorm"),
    ):
        block = _make("basic")
        change(block)
        stock = copy.deepcopy(block)
        torch.testing.assert_close(block(x), _equation(stock, x))
        (row,) = fusedres.report(block)
        assert not row.fused and reason in row.reason
    (row,) = fusedres.report(_make("bottleneck, groups"))
    assert row == ("(model)", "SEBottleneck", True, "")


def test_errors():
    with pytest.raises(ValueError, match="reduction must be from 1 to 16"):
        SEBasicBlock(16, 16, reduction=32)
    block = _make("basic")
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match="must have 16 channels"):
        block(torch.randn(2, 8, 5, 5))
    with pytest.raises(ValueError, match="shortcut must have shape"):
        SEBasicBlock(16, 24, reduction=4)(torch.randn(2, 16, 5, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


class _Hard(Excitation):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _Hard(16, 4), "_Hard has its own forward"),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Sigmoid()), "is a Sequential"),
    ],
)
def test_another_excitation_is_called(make, reason):
    block = _make("basic")
    block.se = make()
    x = torch.randn(3, 16, 5, 5)
    h = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(block(x), F.relu(h * block.se(h) + x), rtol=1e-4, atol=1e-5)
    assert reason in fusedres.report(block)[0].reason


def test_replaced_forward_of_excitation_runs(monkeypatch):
    block, x = _make("basic"), torch.randn(3, 16, 5, 5)
    monkeypatch.setattr(Excitation, "forward", lambda self, h: h.new_zeros(()))
    torch.testing.assert_close(block(x), F.relu(x))


@pytest.mark.parametrize("name", list(BLOCKS))
def test_symbolic_trace(name):
    block, x = _make(name).eval(), torch.randn(2, 16, 8, 8)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x), rtol=1e-4, atol=1e-5)
