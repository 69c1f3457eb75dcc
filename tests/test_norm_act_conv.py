"""conv(act(norm(x))) as one step, alone and where several convolutions read the same values."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from family import check_equation, randomised, saved_bytes, values
from torch import Tensor, fx, nn

import fusedres
from fusedres import NormActConv
from fusedres.autograd import path_counts
from fusedres.modules.norm_act_conv import run_unit

C = 16
ACTIVATIONS = {
    "relu": nn.ReLU, "inplace": lambda: nn.ReLU(inplace=True), "prelu": lambda: nn.PReLU(C), "silu": nn.SiLU,
    "leaky": lambda: nn.LeakyReLU(0.2), "hardswish": nn.Hardswish, "gelu": nn.GELU, "identity": nn.Identity,
}  # fmt: skip
CONVOLUTIONS = {
    "3x3": lambda: nn.Conv2d(C, 24, 3, padding=1, bias=False),
    "1x1 strided": lambda: nn.Conv2d(C, 24, 1, 2, bias=False),
    "grouped": lambda: nn.Conv2d(C, 24, 3, 2, 1, groups=8, bias=False),
    "dilated": lambda: nn.Conv2d(C, 8, (3, 1), padding=(2, 0), dilation=2, bias=False),
}


def _make(activation: str = "relu", convolution: str = "3x3") -> NormActConv:
    return randomised(NormActConv(nn.BatchNorm2d(C), ACTIVATIONS[activation](), CONVOLUTIONS[convolution]()))


def _equation(unit: NormActConv, x: Tensor) -> Tensor:
    return unit.conv(unit.activation(unit.norm(x)))


def _x(dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.channels_last) -> Tensor:
    return torch.randn(4, C, 9, 7).to(dtype).to(memory_format=layout)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equation(activation, convolution, dtype, mode):
    unit = _make(activation, convolution).to(dtype).train(mode == "train")
    before = path_counts["norm_act_conv_backward"]
    check_equation(unit, _equation, _x(dtype))
    assert path_counts["norm_act_conv_backward"] == before + 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(4, C, 9, 7), (1, C, 5, 5), (3, C, 1, 1)])
def test_memory_formats(layout, shape):
    x = torch.randn(shape).to(memory_format=layout)
    for weights in (torch.contiguous_format, torch.channels_last):
        unit = _make().to(memory_format=weights)
        theirs = _equation(copy.deepcopy(unit), x)
        ours = unit(x)
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "prelu", "silu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradients_numerically(activation, mode):
    unit = _make(activation).double().train(mode == "train")
    x = torch.randn(3, C, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, *_: unit(v), (x, *unit.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v, *_: unit(v), (x, *unit.parameters()), fast_mode=True)


@pytest.mark.parametrize("wide", [False, True])
def test_autocast(wide):
    """The norm reads x in its own dtype, and the convolution runs in bfloat16."""
    unit = _make()
    stock = copy.deepcopy(unit)
    x = _x() if wide else _x(torch.bfloat16)
    ours = values(unit, unit, x, autocast=True)
    theirs = values(stock, lambda v: _equation(stock, v), x, autocast=True)
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype, name
        bound = 0.02 * tensor.abs().max().item() + 1e-6
        torch.testing.assert_close(ours[name], tensor, rtol=0.02, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_saves_x_alone():
    unit, x = _make(), _x().requires_grad_()
    state = 4 * C * 4
    assert saved_bytes(lambda: unit(x), x, *unit.parameters()) == state
    assert saved_bytes(lambda: _equation(unit, x), x, *unit.parameters()) >= x.nbytes


@pytest.mark.parametrize("frozen", ["x", "weight", "norm", "all but x"])
def test_partial_gradients(frozen):
    for activation in ("relu", "silu"):
        unit = _make(activation)
        x = _x().requires_grad_(frozen != "x")
        for name, parameter in unit.named_parameters():
            fixed = {"weight": name == "conv.weight", "norm": name.startswith("norm"), "all but x": True}
            parameter.requires_grad_(not fixed.get(frozen, False))
        stock = copy.deepcopy(unit)
        wanted = [t for t in (x, *unit.parameters()) if t.requires_grad]
        theirs = [t for t in (x, *stock.parameters()) if t.requires_grad]
        got = torch.autograd.grad(unit(x).sin().sum(), wanted)
        expected = torch.autograd.grad(_equation(stock, x).sin().sum(), theirs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_several_convolutions_read_the_same(activation):
    norm, act = randomised(nn.BatchNorm2d(C)), ACTIVATIONS[activation]()
    convs = {"a": CONVOLUTIONS["3x3"](), "b": CONVOLUTIONS["1x1 strided"]()}
    x = _x().requires_grad_()
    parameters = [*norm.parameters(), *(conv.weight for conv in convs.values())]
    stock = copy.deepcopy(norm)
    outs, reason = run_unit("unit", x, ("norm", norm), act, convs)
    assert reason is None
    h = act(stock(x))
    theirs = [conv(h) for conv in convs.values()]
    for used in ((0, 1), (0,), (1,)):  # a result that is not used has no gradient
        got = torch.autograd.grad(
            sum(outs[i].sin().sum() for i in used), [x, *parameters], retain_graph=True, allow_unused=True
        )
        others = [x, *stock.parameters(), *(conv.weight for conv in convs.values())]
        expected = torch.autograd.grad(
            sum(theirs[i].sin().sum() for i in used), others, retain_graph=True, allow_unused=True
        )
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_convolution_alone():
    convs = {"conv": CONVOLUTIONS["3x3"]()}
    x = _x().requires_grad_()
    (out,), reason = run_unit("unit", x, None, None, convs)
    assert reason is None
    leaves = [x, convs["conv"].weight]
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), leaves), torch.autograd.grad(convs["conv"](x).sin().sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    single = torch.randn(1, C, 1, 1)  # one value for each channel has no variance, but there is no norm
    assert run_unit("unit", single, None, None, convs)[1] is None


def _hooked(unit: NormActConv) -> None:
    unit.conv.register_forward_hook(lambda *_: None)


def _with_bias(unit: NormActConv) -> None:
    unit.conv = nn.Conv2d(C, 8, 1)


def _group_norm(unit: NormActConv) -> None:
    unit.norm = nn.GroupNorm(2, C)


def _tanh(unit: NormActConv) -> None:
    unit.activation = nn.Tanh()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hooked, "a hook on conv"), (_with_bias, "conv has a bias"), (_group_norm, "norm is a GroupNorm"),
        (_tanh, "there is no kernel for Tanh"),
    ],
)  # fmt: skip
def test_unusual_parts_run_as_they_are(change, reason):
    unit = _make()
    change(unit)
    x = _x()
    assert reason in unit.standing_reason()
    torch.testing.assert_close(unit(x), _equation(copy.deepcopy(unit), x))
    (row,) = fusedres.report(unit)
    assert not row.fused and reason in row.reason


def test_replaced_code_runs(monkeypatch):
    seen = []
    forward = nn.BatchNorm2d.forward
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda *a: seen.append(1) or forward(*a))
    unit = _make()
    unit(_x())
    assert seen and "BatchNorm2d.forward" in unit.standing_reason()


def test_copies_and_traces():
    unit, x = _make().eval(), _x()
    out = unit(x)
    for other in (copy.deepcopy(unit), pickle.loads(pickle.dumps(unit))):
        assert torch.equal(other(x), out)
    traced = fx.symbolic_trace(unit)
    torch.testing.assert_close(traced(x), out)
    with torch.inference_mode():
        assert torch.equal(unit(x), out)
    assert unit(x[:0]).shape[0] == 0


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (lambda: torch.randn(2, C + 1, 5, 5), ValueError, f"must have {C} channels"),
        (lambda: torch.randn(2, C), ValueError, "4 dimensions"),
        (lambda: torch.zeros(2, C, 5, 5, dtype=torch.int64), TypeError, "float32, float64"),
        (lambda: torch.randn(2, C, 5, 5, dtype=torch.float64), TypeError, "conv.weight must be torch.float64 like x"),
        (lambda: torch.randn(2, C, 5, 5, device="meta"), RuntimeError, "like x"),
    ],
)
def test_errors_update_nothing(x, error, match):
    unit = _make()
    before = copy.deepcopy(unit.state_dict())
    with fusedres.use_backend("reference"), pytest.raises(error, match=match):
        unit(x())
    assert all(torch.equal(before[name], tensor) for name, tensor in unit.state_dict().items())


def test_norm_of_other_channels():
    unit = NormActConv(nn.BatchNorm2d(C + 2), nn.ReLU(), nn.Conv2d(C, 4, 1, bias=False))
    with pytest.raises(ValueError, match=f"norm must have {C} channels"):
        unit(_x())
    assert unit.norm.num_batches_tracked == 0


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_backends(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter runs where there is no GPU")
    for activation in ("relu", "silu"):
        unit = _make(activation)
        x = torch.randn(2, C, 4, 3)
        stock = copy.deepcopy(unit)
        with fusedres.use_backend(backend):
            ours = values(unit, unit, x)
        theirs = values(stock, lambda v, stock=stock: _equation(stock, v), x)
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
