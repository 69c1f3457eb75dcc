"""What users do with ResidualTail that tests of numbers do not: shared gradients, unusual modules, hooks, tracing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import fusedres
from fusedres import HighwayConv2d, ResidualTail
from fusedres.autograd import path_counts

SHAPE = (2, 4, 3, 3)


def _unfused(tail: ResidualTail, *tensors: Tensor | None) -> Tensor:
    return tail._unfused(*tensors, *(None,) * (4 - len(tensors)))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1, 1), (5, 1, 3, 3), SHAPE])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_share_no_memory(shape, norm):
    """A gradient that is passed on is accumulated into two leaves, and belongs to the caller."""
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    tail = ResidualTail(kind(shape[1]) if norm else None)
    y, x = (torch.randn(shape, requires_grad=True) for _ in range(2))
    grad = torch.ones(shape)
    if len(shape) == 4:
        grad = grad.contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        tail(y, x).backward(grad)
    assert torch.equal(grad, torch.ones(shape)) and torch.equal(x.grad, 2 * torch.ones(shape))
    before = x.grad.clone()
    y.grad.mul_(3)
    assert torch.equal(x.grad, before)


def _odd_norms() -> dict[str, nn.BatchNorm2d]:
    def made(**changes: object) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(4)
        for name, value in changes.items():
            setattr(norm, name, value)
        return norm

    weights = torch.arange(1.0, 9.0)
    return {
        "strided weight": made(weight=nn.Parameter(weights[::2])),
        "expanded weight": made(weight=nn.Parameter(torch.tensor([2.0]).expand(4))),
        "strided mean": made(running_mean=weights.clone()[::2]),
        "negated weight": made(weight=nn.Parameter(torch.ones(4, dtype=torch.cfloat).conj().imag)),
    }


@pytest.mark.parametrize("name", ["strided weight", "expanded weight", "strided mean", "negated weight"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_odd_vectors_of_a_norm(name, mode):
    norm = _odd_norms()[name].train(mode == "train")
    tail, plain = ResidualTail(norm), ResidualTail(copy.deepcopy(norm))
    y, x = torch.randn(SHAPE), torch.randn(SHAPE)
    assert "no plain vector" in tail.unfused_reason(y, x)
    torch.testing.assert_close(tail(y, x), plain.norm(y) + x)


@pytest.mark.parametrize("attribute", ["running_mean", "weight", "bias"])
def test_short_vectors_of_a_norm_raise_as_in_torch(attribute):
    norm = nn.BatchNorm2d(4)
    buffer = torch.arange(8.0)
    short = buffer[:2]
    setattr(norm, attribute, short if attribute == "running_mean" else nn.Parameter(short))
    with pytest.raises(RuntimeError):
        ResidualTail(norm)(torch.randn(SHAPE), torch.randn(SHAPE))
    assert torch.equal(buffer, torch.arange(8.0))


def test_several_devices_raise_as_in_torch():
    y = torch.randn(SHAPE)
    for call in (
        lambda: ResidualTail()(y, torch.empty(SHAPE, device="meta")),
        lambda: ResidualTail()(y, y, torch.empty(4, device="meta")),
        lambda: ResidualTail(gate="coupled")(y, y, torch.empty(SHAPE, device="meta")),
        lambda: ResidualTail(activation=nn.PReLU(device="meta"))(y, y),
    ):
        with pytest.raises(RuntimeError):
            call()


def test_create_graph_with_one_image():
    """The gradient's gradient path gives the same first gradients, also for one channels_last image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 40, 2, 4, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
    grad = torch.randn(1, 40, 2, 4, generator=generator, dtype=torch.float64)
    tail = ResidualTail(None, nn.BatchNorm2d(40, affine=False).double())
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    found = [torch.autograd.grad(tail(x, leaf), leaf, grad, create_graph=again)[0] for again in (False, True)]
    torch.testing.assert_close(found[0], found[1].detach())


def test_hooks_on_saved_tensors():
    """Hooks may return other strides; other values of size or dtype raise."""
    y, x = torch.randn(SHAPE), torch.randn(SHAPE)
    scale = torch.randn(4, requires_grad=True)
    prelu = ResidualTail(nn.BatchNorm2d(4), activation=nn.PReLU(4))

    def strided(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor + 1], -1)[..., 0]

    for call in (lambda: ResidualTail()(y, x, scale), lambda: prelu(y, x)):
        wanted = [scale, *prelu.parameters()]
        out = call()
        plain = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, strided):
            hooked = torch.autograd.grad(call().square().sum(), wanted, allow_unused=True)
        for one, other in zip(plain, hooked, strict=True):
            assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.flatten()):
        out = prelu(y, x)
    with pytest.raises(RuntimeError, match="hooks on saved tensors must return what was packed"):
        out.sum().backward()


def test_inference_tensors_leave_the_statistics():
    norm = nn.BatchNorm2d(4)
    tail = ResidualTail(norm)
    with torch.inference_mode():
        y = torch.randn(SHAPE)
    before = norm.running_mean.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        tail(y, torch.randn(SHAPE))
    assert torch.equal(norm.running_mean, before)


def test_fx_traces_torchs_operators():
    tail = ResidualTail(nn.BatchNorm2d(4), activation=nn.SiLU(), before_add=True).eval()
    traced = fx.symbolic_trace(tail, concrete_args={"scale": None, "carry": None})
    y, x = torch.randn(SHAPE), torch.randn(SHAPE)
    torch.testing.assert_close(traced(y, x), tail(y, x))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "shortcut must be float32", lambda y: ResidualTail()(y, y.to(torch.cfloat))),
        (TypeError, "scale must be float32", lambda y: ResidualTail()(y, y, torch.ones(4, dtype=torch.cfloat))),
        (TypeError, "scale must be a tensor, got a float", lambda y: ResidualTail()(y, y, 0.5)),
        (RuntimeError, "3", lambda y: ResidualTail(activation=nn.PReLU(3))(y, y)),
    ],
)
def test_wrong_kinds(error, message, call):
    with pytest.raises(error, match=message):
        call(torch.randn(SHAPE))


def test_a_replaced_forward_runs(monkeypatch):
    monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda self, x: x * 0 + 42.0)
    assert (ResidualTail(nn.BatchNorm2d(4))(torch.randn(SHAPE), torch.zeros(SHAPE)) == 42.0).all()


def test_autocast_chooses_the_dtype_of_prelu():
    tail = ResidualTail(activation=nn.PReLU())
    y, x = torch.randn(SHAPE), torch.randn(SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        assert tail(y, x).dtype is _unfused(tail, y, x).dtype


def test_compiled_tails_run_torchs_operators():
    tail = ResidualTail(nn.BatchNorm2d(4), activation=nn.ReLU())
    plain = copy.deepcopy(tail)
    y, x = torch.randn(SHAPE), torch.randn(SHAPE)
    before = path_counts["tail_forward"]
    out = torch.compile(tail, fullgraph=True, backend="eager")(y, x)
    torch.testing.assert_close(out, F.relu(plain.norm(y) + x))
    assert path_counts["tail_forward"] == before


def test_copies_and_pickles():
    import pickle

    tail = ResidualTail(nn.BatchNorm2d(4), activation=nn.PReLU())
    y, x = torch.randn(SHAPE), torch.randn(SHAPE)
    want = tail.eval()(y, x)
    for other in (copy.deepcopy(tail), pickle.loads(pickle.dumps(tail))):
        assert torch.equal(other(y, x), want)
    assert list(tail.state_dict()) == [*(f"norm.{k}" for k in tail.norm.state_dict()), "activation.weight"]


def test_report_has_a_row_for_each_tail():
    model = nn.Sequential(HighwayConv2d(4), ResidualTail(nn.InstanceNorm2d(4)), ResidualTail(nn.BatchNorm2d(4)))
    model[0](torch.randn(SHAPE))
    model[2](torch.randn(0, 4, 3, 3), torch.randn(0, 4, 3, 3))
    rows = [tuple(row) for row in fusedres.report(model)]
    assert rows == [
        ("0.tail", "ResidualTail", True, ""),
        ("1", "ResidualTail", False, "there is no kernel for InstanceNorm2d"),
        ("2", "ResidualTail", False, "its last input ran unfused: the batch was empty"),
    ]
