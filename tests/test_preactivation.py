"""Pre-activation blocks against the equations of He et al. 2016 in plain PyTorch."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from family import check_equation, randomised, saved_bytes, values
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fusedres
from fusedres import PreActBasicBlock, PreActBottleneck, PreActSequential, ZeroPadShortcut
from fusedres.autograd import path_counts
from fusedres.modules.preactivation import PreActBlock

BLOCKS = {
    "basic": lambda: PreActBasicBlock(16, 16),
    "basic, projection": lambda: PreActBasicBlock(16, 24, 2, nn.Conv2d(16, 24, 1, 2, bias=False)),
    "basic, zero padding": lambda: PreActBasicBlock(16, 32, 2, ZeroPadShortcut(16, 32, 2)),
    "basic, SiLU": lambda: PreActBasicBlock(16, 16, activation=nn.SiLU()),
    "bottleneck": lambda: PreActBottleneck(16, 4),
    "bottleneck, projection": lambda: PreActBottleneck(16, 8, 2, nn.Conv2d(16, 32, 1, 2, bias=False)),
    "bottleneck, PReLU": lambda: PreActBottleneck(16, 4, activation=nn.PReLU()),
}


def _make(name: str) -> PreActBlock:
    return randomised(BLOCKS[name]())


def _equation(block: PreActBlock, x: Tensor) -> Tensor:
    act = nn.ReLU() if type(block.activation) is nn.ReLU else block.activation
    first = act(block.bn1(x))
    shortcut = x
    if isinstance(block.downsample, nn.Conv2d):
        shortcut = block.downsample(first)
    elif block.downsample is not None:
        shortcut = block.downsample(x)
    h = block.conv2(act(block.bn2(block.conv1(first))))
    if isinstance(block, PreActBottleneck):
        h = block.conv3(act(block.bn3(h)))
    return h + shortcut


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", BLOCKS)
def test_equation(name, dtype, mode):
    block = _make(name).to(dtype).train(mode == "train")
    x = torch.randn(3, 16, 8, 6).to(dtype).to(memory_format=torch.channels_last)
    before = path_counts["norm_act_conv_backward"]
    check_equation(block, _equation, x)
    assert path_counts["norm_act_conv_backward"] == before + block.depth
    assert block.fused_last_reason == ""


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_numerically(name):
    block = _make(name).double()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: block(v), (x, *block.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_residual_is_the_identity(name, dtype):
    block = _make(name).to(dtype)
    last = block.conv2 if name == "basic" else block.conv3
    nn.init.zeros_(last.weight)
    x = torch.randn(2, 16, 5, 5).to(dtype).requires_grad_()
    out = block(x)
    grad = torch.randn_like(out)
    assert torch.equal(out, x) and torch.equal(torch.autograd.grad(out, x, grad)[0], grad)


def test_sum_of_residuals():
    """Equation 4 of the paper: x_L = x_l + ΣF, as nothing stands after the add."""
    blocks = [_make("basic") for _ in range(5)]
    x = first = torch.randn(2, 16, 6, 6)
    total = torch.zeros_like(x, dtype=torch.float64)
    with torch.no_grad():
        for block in blocks:
            residual = copy.deepcopy(block).double()
            total += _equation(residual, x.double()) - x.double()
            x = block(x)
    right = first.double() + total
    assert (x.double() - right).abs().max() <= 16 * 2.0**-24 * right.abs().max() * len(blocks)


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_saves_half_of_torch(name):
    block = _make(name)
    x = torch.randn(4, 16, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    ours = saved_bytes(lambda: block(x), *block.parameters())
    theirs = saved_bytes(lambda: _equation(block, x), *block.parameters())
    assert ours <= 0.55 * theirs


def test_the_input_stays_as_it_is():
    """The add is in place on the branch, never on x; a shortcut's result is not saved."""
    for name in BLOCKS:
        block = _make(name)
        x = torch.randn(2, 16, 6, 6, requires_grad=True)
        before = x.detach().clone()
        out = block(x)
        out.sum().backward()
        assert torch.equal(x, before)
        out = block(x)
        out.detach().zero_()  # belongs to the caller
        with torch.no_grad():
            x.copy_(before)


def test_unusual_blocks_run_as_they_are():
    block, x = _make("basic"), torch.randn(2, 16, 6, 6)
    stock = copy.deepcopy(block)
    block.bn2.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(block(x), _equation(stock, x))
    (row,) = fusedres.report(block)
    assert row == ("(model)", "PreActBasicBlock", False, "a hook on bn2")
    (row,) = fusedres.report(_make("bottleneck"))
    assert row == ("(model)", "PreActBottleneck", True, "")


def test_compiled_blocks_are_torch_s():
    block = _make("basic, projection").eval()
    x = torch.randn(2, 16, 6, 6)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), block(x))
    program = torch.export.export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("make", [lambda: PreActBasicBlock(16, 24), lambda: PreActBasicBlock(16, 16, 2)])
def test_a_shortcut_of_another_shape(make):
    with pytest.raises(ValueError, match="shortcut must have shape"):
        make()(torch.randn(2, 16, 6, 6))


def test_activation_before_each_convolution():
    block = PreActBasicBlock(16, 16, activation=nn.GELU())
    x = torch.randn(2, 16, 5, 5)
    h = F.gelu(block.bn1(x))
    expected = block.conv2(F.gelu(block.bn2(block.conv1(h)))) + x
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def _row(kind: type[nn.Sequential]) -> nn.Sequential:
    """Return blocks with every kind of shortcut, and a module between two of them."""
    names = ("basic", "bottleneck", "bottleneck, PReLU", "basic, SiLU")
    row = [*map(_make, names), nn.Identity(), _make("basic"), _make("basic, projection")]
    return kind(*row)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_row_of_blocks(mode, dtype, layout):
    """The numbers of the blocks one by one, bit by bit, with the adds and the statistics in one pass."""
    row = _row(PreActSequential).to(dtype).train(mode == "train")
    plain = _row(nn.Sequential).to(dtype).train(mode == "train")
    plain.load_state_dict(row.state_dict())
    x = torch.randn(3, 16, 8, 6).to(dtype).to(memory_format=layout)
    before = path_counts["sum_statistics"]
    ours = values(row, row, x)
    joined = mode == "train" and layout is torch.channels_last
    assert path_counts["sum_statistics"] == before + (4 if joined else 0)
    theirs = values(plain, plain, x)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert all(report.fused for report in fusedres.report(row))


def test_gradients_of_a_row_numerically():
    row = PreActSequential(_make("basic"), _make("basic, projection")).double()
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    before = path_counts["sum_statistics"]
    assert torch.autograd.gradcheck(lambda v, *_: row(v), (x, *row.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v, *_: row(v), (x, *row.parameters()), fast_mode=True)
    assert path_counts["sum_statistics"] > before


def test_hooks_of_blocks_in_a_row_run():
    row = _row(PreActSequential)
    x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last)
    expected = copy.deepcopy(row)(x)
    seen = []
    for block in row:
        block.register_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    assert torch.equal(row(x), expected) and len(seen) == len(row)
    inner = _row(PreActSequential)
    inner.load_state_dict(row.state_dict())
    inner[1].bn1.register_forward_hook(lambda m, i, o: seen.append("bn1"))
    inner(x)
    assert seen[-1] == "bn1"


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_on_other_backends(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    row = PreActSequential(_make("basic"), _make("basic"))
    x = torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)
    other = copy.deepcopy(row)
    theirs = values(other, other, x)
    with fusedres.use_backend(backend):
        ours = values(row, row, x)
    for name in ("out", "stats.0.bn1.running_mean", "stats.1.bn1.running_var"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def _saves_convolutions(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    convolves = op is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if convolves else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint_of_convolutions():
    """The add does not write into what a selective checkpoint has kept."""
    blocks = PreActSequential(_make("basic"), _make("basic, projection"))
    twin = copy.deepcopy(blocks)
    contexts = partial(create_selective_checkpoint_contexts, _saves_convolutions)
    x = torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    checkpoint(blocks, x, use_reentrant=False, context_fn=contexts).square().sum().backward()
    twin(x.detach()).square().sum().backward()
    for got, expected in zip(blocks.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_a_next_block_that_does_not_fit_is_not_updated():
    blocks = PreActSequential(_make("basic"), PreActBasicBlock(16, 24, 2))
    with pytest.raises(ValueError, match="give the block a downsample"):
        blocks(torch.randn(2, 16, 6, 6).to(memory_format=torch.channels_last))
    assert blocks[1].bn1.num_batches_tracked == 0
