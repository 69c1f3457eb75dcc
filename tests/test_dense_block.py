"""torchvision's dense blocks, fused, against their stock forward."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torchvision
from family import check_equation, randomised, saved_bytes, values
from torch import Tensor, fx, nn
from torchvision.models.densenet import _DenseBlock

import fusedres
from fusedres.autograd import path_counts
from fusedres.modules.densenet import FusedDenseBlock

C, GROWTH, DEPTH = 16, 8, 3
NCHW, NHWC = torch.contiguous_format, torch.channels_last


def _make(depth: int = DEPTH, drop_rate: float = 0.0, efficient: bool = False) -> FusedDenseBlock:
    return fusedres.fuse(randomised(_DenseBlock(depth, C, 2, GROWTH, drop_rate, efficient)))


def _x(dtype: torch.dtype = torch.float32, layout: torch.memory_format = NHWC, shape=(3, C, 6, 5)) -> Tensor:
    return torch.randn(shape).to(dtype).to(memory_format=layout)


def _stock(block: nn.Module, x: Tensor) -> Tensor:
    return type(block)._stock.forward(block, x)


def _paths(*names: str) -> list[int]:
    return [path_counts[f"dense_block_{name}"] for name in names]


# In 16 bits the masks of ReLUs flip by rounding, in ours and in torch's: test_errors_in_16_bits has an average.
@pytest.mark.parametrize("mode", ["train", "eval", "frozen norms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_equation(layout, dtype, mode):
    block = _make().to(dtype).train(mode != "eval")
    if mode == "frozen norms":  # some of them: layers of both kinds read the same channels
        for norm in (block.denselayer2.norm1, block.denselayer3.norm2):
            norm.eval()
    before = _paths("forward", "backward")
    check_equation(block, _stock, _x(dtype, layout))
    assert _paths("forward", "backward") == [count + 1 for count in before]
    assert block.fused_last_reason == ""


def test_no_memory_is_read_before_it_is_written():
    """torch fills new memory with NaN here."""
    block, x = _make(), _x()
    right = values(block, block, x)
    torch.use_deterministic_algorithms(True)
    try:
        found = values(block, block, x)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("out", "grad_x", *(f"grad.{name}" for name, _ in block.named_parameters())):
        assert torch.equal(found[name], right[name]), name


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_in_16_bits(dtype, mode):
    """Over several blocks, each tensor's error is on average no larger than that of the stock forward."""
    ratios: dict[str, list[float]] = {}
    for seed in range(10):
        torch.manual_seed(seed)
        block, x = _make().to(dtype).train(mode == "train"), _x(dtype)
        exact, stock = copy.deepcopy(block).double(), copy.deepcopy(block)
        right = values(exact, lambda v, b=exact: _stock(b, v), x.double())
        theirs = values(stock, lambda v, b=stock: _stock(b, v), x)
        ours = values(block, block, x)
        assert block.fused_last_reason == ""
        for name, value in right.items():
            errors = [(found[name].double() - value).norm().item() for found in (ours, theirs)]
            if min(errors) > 0:
                ratios.setdefault(name, []).append(math.log(errors[0] / errors[1]))
    means = {name: math.exp(sum(found) / len(found)) for name, found in ratios.items() if len(found) > 5}
    assert len(means) > 15 and max(means.values()) < 1.5, means
    assert math.exp(sum(map(math.log, means.values())) / len(means)) < 1.1, means


def test_large_means():
    """The gradient of the output has a large mean, and x is far from 0: corrections are larger than results."""
    block, x = _make(4), (_x() + 30).requires_grad_()
    exact, stock = copy.deepcopy(block).double(), copy.deepcopy(block)
    weight = torch.randn(3, C + 4 * GROWTH, 6, 5) + 10
    wide = x.detach().double().requires_grad_()
    (right,) = torch.autograd.grad((_stock(exact, wide) * weight).sum(), wide)
    errors = []
    for run in (block, lambda v: _stock(stock, v)):
        (grad,) = torch.autograd.grad((run(x) * weight).sum(), x)
        errors.append((grad - right).abs().max().item())
    assert errors[0] <= 2 * errors[1] + 64 * 2.0**-24 * right.abs().max().item()


@pytest.mark.parametrize("layout", [NCHW, NHWC])
@pytest.mark.parametrize("weights", [NCHW, NHWC])
@pytest.mark.parametrize("shape", [(3, C, 6, 5), (1, C, 4, 4), (3, C, 1, 1)])
def test_memory_formats(shape, weights, layout):
    block, x = _make().to(memory_format=weights), _x(layout=layout, shape=shape).requires_grad_()
    theirs = _stock(copy.deepcopy(block), x)
    ours = block(x)
    assert ours.stride() == theirs.stride()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(out.sin().sum(), x)[0] for out in (ours, theirs)]
    if shape[2] > 1:
        assert grads[0].stride() == grads[1].stride()
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("layout", [NCHW, NHWC])
def test_gradients_numerically(layout, mode):
    block = fusedres.fuse(randomised(_DenseBlock(2, 5, 2, 3, 0.0))).double().train(mode == "train")
    x = _x(torch.float64, layout, (2, 5, 3, 3)).requires_grad_()
    before = _paths("composite_backward")
    assert torch.autograd.gradcheck(lambda v, *_: block(v), (x, *block.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v, *_: block(v), (x, *block.parameters()), fast_mode=True)
    assert _paths("composite_backward") > before


def test_second_derivatives_are_those_of_torch():
    block, x = _make().double(), _x(torch.float64).requires_grad_()
    found = []
    for run in (block, lambda v: _stock(block, v)):
        (grad,) = torch.autograd.grad(run(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), (x, *block.parameters())))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batches_of_gradients():
    block, x = _make().double(), _x(torch.float64).requires_grad_()
    out, stock = block(x), _stock(block, x)
    grads = torch.randn(2, *out.shape, dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(y, x, grads, is_grads_batched=True)[0] for y in (out, stock))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wide", [False, True])
def test_autocast(wide):
    """The norms read x in its own dtype, also the channels that convolutions in bfloat16 have appended."""
    block = _make()
    stock = copy.deepcopy(block)
    x = _x() if wide else _x(torch.bfloat16)
    ours = values(block, block, x, autocast=True)
    theirs = values(stock, lambda v: _stock(stock, v), x, autocast=True)
    assert block.fused_last_reason == ""
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        bound = 0.03 * tensor.abs().max().item() + 1e-6
        torch.testing.assert_close(ours[name], tensor, rtol=0.03, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics(momentum):
    block = _make()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = momentum
    stock = copy.deepcopy(block)
    for step in range(3):
        x = _x() + step
        block(x)
        _stock(stock, x)
    for (name, ours), theirs in zip(block.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_options_of_the_norms():
    """Without affine parameters, without running statistics, and one norm in two layers."""
    block = _make()
    block.denselayer1.norm1 = nn.BatchNorm2d(C, affine=False)
    block.denselayer2.norm1 = nn.BatchNorm2d(C + GROWTH, track_running_stats=False)
    block.denselayer3.norm2 = block.denselayer2.norm2
    for mode in (True, False):
        check_equation(block.train(mode), _stock, _x())
        assert block.fused_last_reason == ""


def test_saved_bytes():
    block = _make(6)
    x = _x(shape=(4, C, 12, 12)).requires_grad_()
    ours = saved_bytes(lambda: block(x), *block.parameters())
    theirs = saved_bytes(lambda: _stock(block, x), *block.parameters())
    assert ours <= 0.56 * theirs
    efficient = _make(6, efficient=True)
    theirs = saved_bytes(lambda: _stock(efficient, x), *efficient.parameters())
    assert saved_bytes(lambda: efficient(x), *efficient.parameters()) < theirs


def test_memory_efficient_counts_a_batch_once():
    block, x = _make(efficient=True), _x().requires_grad_()
    block(x).sum().backward()
    assert block.denselayer1.norm1.num_batches_tracked == 1 and block.fused_last_reason == ""


@pytest.mark.parametrize("kept", [(), ("x",), ("denselayer2.conv1.weight",), ("denselayer2.norm1.bias", "x"),
                                  ("denselayer3.conv2.weight",), ("denselayer1.norm2.weight",)])  # fmt: skip
def test_partial_gradients(kept):
    block = _make()
    x = _x().requires_grad_("x" in kept)
    parameters = dict(block.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in kept)
    stock = copy.deepcopy(block)
    theirs_of = dict(stock.named_parameters())
    out, other = block(x), _stock(stock, x)
    assert out.requires_grad == bool(kept)
    if kept:
        got = torch.autograd.grad(out.sin().sum(), [x if n == "x" else parameters[n] for n in kept])
        expected = torch.autograd.grad(other.sin().sum(), [x if n == "x" else theirs_of[n] for n in kept])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_only_what_is_asked_for_is_computed():
    block, x = _make(), _x().requires_grad_()
    out = block(x)
    weight = block.denselayer3.conv2.weight
    (ours,) = torch.autograd.grad(out.sin().sum(), weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(_stock(copy.deepcopy(block), x).sin().sum(), weight, allow_unused=True) or (None,)
    assert theirs is None
    block.zero_grad()
    out.sin().sum().backward()
    torch.testing.assert_close(block.denselayer3.conv2.weight.grad, ours)


def test_the_gradient_of_the_output_stays_as_it_is():
    block, x = _make(), _x().requires_grad_()
    out = block(x)
    grad = torch.randn_like(out)
    before = grad.clone()
    for _ in range(2):
        out.backward(grad, retain_graph=True)
    assert torch.equal(grad, before)
    out = block(x)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_copies_and_traces():
    block, x = _make().eval(), _x()
    out = block(x)
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(other) is FusedDenseBlock and torch.equal(other(x), out)
    torch.testing.assert_close(fx.symbolic_trace(block)(x), out)
    torch.testing.assert_close(torch.jit.trace(block, x)(x), out)
    torch.testing.assert_close(torch.jit.script(copy.deepcopy(block))(x), out)
    torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), out)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), out)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), out)
    assert block(x[:0]).shape[0] == 0
    assert type(fusedres.unfuse(block)) is _DenseBlock
    torch.testing.assert_close(block(x), out)


def _hook(block: nn.Module) -> None:
    block.denselayer2.conv1.register_forward_hook(lambda *_: None)


def _hook_on_layer(block: nn.Module) -> None:
    block.denselayer2.register_forward_pre_hook(lambda *_: None)


def _other_layer(block: nn.Module) -> None:
    block.denselayer3 = nn.Identity()


def _bias(block: nn.Module) -> None:
    block.denselayer1.conv2 = nn.Conv2d(2 * GROWTH, GROWTH, 3, padding=1)


def _silu(block: nn.Module) -> None:
    block.denselayer1.relu2 = nn.SiLU()


def _method(block: nn.Module) -> None:
    block.denselayer1.bn_function = block.denselayer1.bn_function


def _group_norm(block: nn.Module) -> None:
    block.denselayer1.norm1 = nn.GroupNorm(2, C)


UNUSUAL = [
    (_hook, "a hook on denselayer2.conv1"), (_hook_on_layer, "a hook on denselayer2"),
    (_other_layer, "denselayer3 is a Identity, not a _DenseLayer"), (_bias, "denselayer1.conv2 has a bias"),
    (_silu, "denselayer1.relu2 is a SiLU, not a ReLU"), (_group_norm, "denselayer1.norm1 is a GroupNorm"),
    (_method, "denselayer1.bn_function is replaced on the instance"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), UNUSUAL)
def test_unusual_parts_run_as_they_are(change, reason):
    block = _make()
    change(block)
    (row,) = fusedres.report(block)
    assert not row.fused and reason in row.reason
    if change is not _other_layer:
        stock, x, before = copy.deepcopy(block), _x(), _paths("forward")
        torch.testing.assert_close(block(x), _stock(stock, x))
        assert _paths("forward") == before


def test_dropout_runs_as_it_is():
    block, x = _make(drop_rate=0.5), _x()
    assert fusedres.report(block)[0].reason == "denselayer1 has drop_rate 0.5 in training"
    torch.manual_seed(0)
    ours = block(x)
    torch.manual_seed(0)
    torch.testing.assert_close(ours, _stock(copy.deepcopy(block), x))
    block.eval()
    torch.testing.assert_close(block(x), _stock(block, x), rtol=1e-4, atol=1e-4)
    assert fusedres.report(block)[0].fused and block.fused_last_reason == ""


def test_replaced_code_runs(monkeypatch):
    seen = []
    forward = torchvision.models.densenet._DenseLayer.forward
    replaced = lambda *a: seen.append(1) or forward(*a)  # noqa: E731
    monkeypatch.setattr(torchvision.models.densenet._DenseLayer, "forward", replaced)
    block = _make()
    block(_x())
    assert len(seen) == DEPTH and "DenseLayer.forward is replaced" in fusedres.report(block)[0].reason


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (lambda: torch.randn(2, C + 1, 5, 5), ValueError, f"must have {C} channels"),
        (lambda: torch.randn(2, C), ValueError, "4 dimensions"),
        (lambda: torch.zeros(2, C, 5, 5, dtype=torch.int64), TypeError, "float32, float64"),
        (lambda: torch.randn(2, C, 5, 5, dtype=torch.float64), TypeError, "denselayer1.conv1.weight must be"),
        (lambda: torch.randn(1, C, 1, 1), ValueError, "Expected more than 1 value per channel"),
    ],
)
def test_errors_update_nothing(x, error, match):
    block = _make()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(error, match=match):
        block(x())
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())


def test_parts_that_do_not_fit():
    block = _make()
    block.denselayer3.conv1 = nn.Conv2d(C, 2 * GROWTH, 1, bias=False)
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=r"denselayer3\.conv1"):
        block(_x())
    assert all(torch.equal(before[name], tensor) for name, tensor in block.state_dict().items())
    assert "it raises" in fusedres.report(block)[0].reason


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    block, x = _make(), _x(shape=(2, C, 4, 3))
    stock = copy.deepcopy(block)
    with fusedres.use_backend(backend):
        ours = values(block, block, x)
    theirs = values(stock, lambda v: _stock(stock, v), x)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
