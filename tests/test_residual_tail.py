"""ResidualTail: every design against a plain PyTorch twin of its paper's equation, by the rule of tolerance.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from family import saved_bytes
from reference import Oracle, Values
from tolerance import check
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres import ResidualTail
from fusedres.autograd import path_counts

C = 24


class Design(NamedTuple):
    """A tail, the shapes of its scale and carry ("full": of the branch), and the equation of its paper."""

    tail: Callable[[], ResidualTail]
    twin: Callable[..., Tensor]  # of the tail's modules, branch, shortcut, scale, carry
    scale: tuple[int, ...] | str | None = None
    carry: tuple[int, ...] | str | None = None
    with_shortcut: bool = True


def _norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(C)


def _highway(m: ResidualTail, y: Tensor, x: Tensor, t: Tensor, _: Any) -> Tensor:
    gate = torch.sigmoid(t)
    return gate * F.relu(y) + (1 - gate) * x


DESIGNS = {
    "resnet": Design(
        lambda: ResidualTail(_norm(), activation=nn.ReLU()), lambda m, y, x, s, c: F.relu(m.norm(y) + x)
    ),
    "projection": Design(
        lambda: ResidualTail(_norm(), _norm(), nn.ReLU()),
        lambda m, y, x, s, c: F.relu(m.norm(y) + m.shortcut_norm(x)),
    ),
    "pre-activation": Design(lambda: ResidualTail(), lambda m, y, x, s, c: y + x),
    "highway": Design(
        lambda: ResidualTail(activation=nn.ReLU(), before_add=True, gate="coupled"), _highway, scale="full"
    ),
    "two gates": Design(
        lambda: ResidualTail(_norm(), activation=nn.SiLU(), before_add=True, gate="logits"),
        lambda m, y, x, s, c: torch.sigmoid(s) * F.silu(m.norm(y)) + torch.sigmoid(c) * x,
        "full",
        "full",
    ),
    "squeeze-and-excitation": Design(
        lambda: ResidualTail(_norm(), activation=nn.ReLU()),
        lambda m, y, x, s, c: F.relu(s * m.norm(y) + x),
        scale=(4, C, 1, 1),
    ),
    "layer scale": Design(
        lambda: ResidualTail(), lambda m, y, x, s, c: s[:, None, None] * y + x, scale=(C,)
    ),
    "rezero": Design(lambda: ResidualTail(_norm()), lambda m, y, x, s, c: s * m.norm(y) + x, scale=()),
    "scaled shortcut": Design(
        lambda: ResidualTail(_norm(), _norm(), nn.ReLU()),
        lambda m, y, x, s, c: F.relu(m.norm(y) + c.view(1, C, 1, 1) * m.shortcut_norm(x)),
        carry=(C,),
    ),
    "stochastic depth": Design(
        lambda: ResidualTail(_norm(), activation=nn.ReLU()),
        lambda m, y, x, s, c: F.relu(s.view(4, 1, 1, 1) * m.norm(y) + x),
        scale=(4, 1),
    ),
    "yolo": Design(
        lambda: ResidualTail(_norm(), activation=nn.SiLU(), before_add=True),
        lambda m, y, x, s, c: F.silu(m.norm(y)) + x,
    ),
    "scaled yolo": Design(
        lambda: ResidualTail(_norm(), activation=nn.SiLU(), before_add=True),
        lambda m, y, x, s, c: s * F.silu(m.norm(y)) + x,
        scale=(4, C, 1, 1),
    ),
    "convolution, norm, hardswish": Design(
        lambda: ResidualTail(_norm(), activation=nn.Hardswish(), before_add=True),
        lambda m, y, x, s, c: F.hardswish(m.norm(y)),
        with_shortcut=False,
    ),
    "prelu": Design(
        lambda: ResidualTail(_norm(), activation=nn.PReLU(C)),
        lambda m, y, x, s, c: F.prelu(m.norm(y) + x, m.activation.weight),
    ),
    "one prelu before, scaled": Design(
        lambda: ResidualTail(_norm(), activation=nn.PReLU(), before_add=True),
        lambda m, y, x, s, c: s.view(1, C, 1, 1) * F.prelu(m.norm(y), m.activation.weight) + x,
        scale=(C,),
    ),
    "leaky": Design(
        lambda: ResidualTail(_norm(), activation=nn.LeakyReLU(0.1)),
        lambda m, y, x, s, c: F.leaky_relu(m.norm(y) + x, 0.1),
    ),
    "gelu after": Design(
        lambda: ResidualTail(activation=nn.GELU()), lambda m, y, x, s, c: F.gelu(y + x)
    ),
}  # fmt: skip


def _make(name: str, dtype: torch.dtype, layout: torch.memory_format) -> tuple[ResidualTail, dict[str, Tensor | None]]:
    design, generator = DESIGNS[name], torch.Generator().manual_seed(7)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tail = design.tail()
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.copy_(draw(parameter.shape) * 0.3 + 0.8)
        for buffer in tail.buffers():
            if buffer.is_floating_point():
                buffer.copy_(draw(buffer.shape).abs() + 0.5)
    shape = (4, C, 5, 7)
    given: dict[str, Tensor | None] = {"branch": draw(shape), "shortcut": draw(shape) if design.with_shortcut else None}
    for side in ("scale", "carry"):
        size = getattr(design, side)
        given[side] = None if size is None else draw(shape if size == "full" else size)
    for key, tensor in given.items():
        if tensor is not None:
            tensor = tensor.to(dtype)
            given[key] = tensor.to(memory_format=layout) if tensor.shape == shape else tensor
    return tail.to(dtype), given


def _run(module: ResidualTail, call: Callable[..., Tensor], given: dict[str, Tensor | None], grad: Tensor) -> Values:
    module.zero_grad(set_to_none=True)
    leaves = {
        key: None if t is None else t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for key, t in given.items()
    }
    out = call(*leaves.values())
    out.backward(grad.to(out.dtype))
    found: Values = {"out": out.detach()}
    found |= {f"grad_{key}": leaf.grad for key, leaf in leaves.items() if leaf is not None}
    found |= {f"grad.{key}": parameter.grad for key, parameter in module.named_parameters()}
    return found | {f"stats.{key}": buffer.clone() for key, buffer in module.named_buffers()}


def _twin(name: str, module: ResidualTail) -> Callable[..., Tensor]:
    return lambda *tensors: DESIGNS[name].twin(module, *tensors)


def _oracle(name: str, tail: ResidualTail, given: dict[str, Tensor | None], grad: Tensor) -> Oracle:
    """Return the twin's run in float64; terms and spread are bounded by the largest value of each tensor."""
    exact = copy.deepcopy(tail).double()
    wide = {key: None if t is None else t.double().contiguous() for key, t in given.items()}
    values = _run(exact, _twin(name, exact), wide, grad.double())
    counts = {"grad.": 4 * 35, "grad_scale": 4 * 35, "grad_carry": 4 * 35}
    terms, spread = {}, {}
    for key, value in values.items():
        if value.is_floating_point():
            size = next((count for start, count in counts.items() if key.startswith(start)), 4)
            if DESIGNS[name].scale == () and key == "grad_scale":
                size *= C
            terms[key] = torch.full_like(value, size)
            spread[key] = value.abs()
    return Oracle(values, terms, spread)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", DESIGNS)
def test_design(name, dtype, mode, layout):
    tail, given = _make(name, dtype, layout)
    tail.train(mode == "train")
    grad = torch.randn(4, C, 5, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    oracle = _oracle(name, tail, given, grad)
    plain = copy.deepcopy(tail)
    eager = _run(plain, _twin(name, plain), given, grad)
    before = path_counts["tail_backward"]
    got = _run(tail, tail, given, grad)
    assert path_counts["tail_backward"] == before + 1
    check(got, eager, oracle, dtype, name)
    out = tail(*given.values())
    assert out.stride() == DESIGNS[name].twin(plain, *given.values()).stride()


@pytest.mark.parametrize("name", DESIGNS)
def test_gradients_numerically(name):
    """gradcheck of all inputs and parameters, and of the gradients' gradients."""
    tail, given = _make(name, torch.float64, torch.channels_last)
    small = {
        key: None if t is None else (t[..., :1, :2].contiguous(memory_format=torch.channels_last)
                                     if t.shape[-2:] == (5, 7) else t)
        for key, t in given.items()
    }  # fmt: skip
    leaves = [t.clone().requires_grad_() for t in small.values() if t is not None]
    present = [key for key, t in small.items() if t is not None]
    parameters = list(tail.parameters())

    def run(*tensors: Tensor) -> Tensor:
        named = dict(zip(present, tensors, strict=False))
        return tail(named["branch"], named.get("shortcut"), named.get("scale"), named.get("carry"))

    assert torch.autograd.gradcheck(run, (*leaves, *parameters), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (*leaves, *parameters), fast_mode=True)


@pytest.mark.parametrize("shape", [(6, C), (6, C, 1, 1)])
def test_fully_connected(shape):
    """A highway layer of (N, C), as in Srivastava et al. 2015, and one pixel an image."""
    tail = ResidualTail(activation=nn.ReLU(), before_add=True, gate="coupled")
    y, x, t = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    leaves = [v.clone().requires_grad_() for v in (y, x, t)]
    out, want = tail(*leaves), _highway(tail, y, x, t, None)
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    plain = [v.clone().requires_grad_() for v in (y, x, t)]
    _highway(tail, *plain, None).square().sum().backward()
    for leaf, other in zip(leaves, plain, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize(
    ("name", "tensors", "bits"),
    [
        ("resnet", 1, 1), ("pre-activation", 0, 0), ("highway", 3, 0), ("squeeze-and-excitation", 1, 1),
        ("stochastic depth", 1, 1), ("yolo", 1, 0), ("leaky", 1, 1), ("prelu", 2, 0), ("gelu after", 2, 0),
        ("layer scale", 1, 0), ("convolution, norm, hardswish", 1, 0), ("projection", 2, 1),
    ],
)  # fmt: skip
def test_saved_bytes(name, tensors, bits):
    """Whole tensors, and bits of each element, that the equation's gradients need; vectors on top are few."""
    tail, given = _make(name, torch.float32, torch.channels_last)
    leaves = [None if t is None else t.requires_grad_() for t in given.values()]
    elements = 4 * C * 35
    counted = saved_bytes(lambda: tail(*leaves), *tail.parameters())
    vectors = 4 * C * 4 * 4 * 4
    assert (
        tensors * 4 * elements + bits * elements // 8
        <= counted
        <= tensors * 4 * elements + bits * elements // 8 + vectors
    )


def test_zero_residual_is_the_identity():
    tail, given = _make("rezero", torch.float32, torch.channels_last)
    x = given["shortcut"].requires_grad_()
    out = tail(given["branch"], x, torch.zeros(()))
    assert torch.equal(out, x)
    grad = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, x, grad)[0], grad)


def test_an_untouched_gradient_is_passed_on():
    """F + x has nothing to compute backward: both gradients are that of out, without a pass."""
    tail, given = _make("pre-activation", torch.float32, torch.channels_last)
    leaves = [given[key].requires_grad_() for key in ("branch", "shortcut")]
    grad = torch.randn(4, C, 5, 7).to(memory_format=torch.channels_last)
    found = torch.autograd.grad(tail(*leaves), leaves, grad)
    assert all(torch.equal(each, grad) for each in found)


@pytest.mark.parametrize("needed", ["branch", "shortcut", "scale"])
def test_only_some_gradients(needed):
    for name in ("squeeze-and-excitation", "scaled yolo", "highway"):
        tail, given = _make(name, torch.float32, torch.channels_last)
        tail.requires_grad_(False)
        leaves = {k: None if t is None else t.clone().requires_grad_(k == needed) for k, t in given.items()}
        tail(*leaves.values()).square().sum().backward()
        plain = {k: None if t is None else t.clone().requires_grad_(k == needed) for k, t in given.items()}
        DESIGNS[name].twin(tail, *plain.values()).square().sum().backward()
        torch.testing.assert_close(leaves[needed].grad, plain[needed].grad, rtol=1e-4, atol=1e-4)
        assert all(t is None or t.grad is None for k, t in leaves.items() if k != needed)


def test_dtypes_are_promoted_as_in_torch():
    tail = ResidualTail(nn.BatchNorm2d(C), activation=nn.ReLU())
    y, x = torch.randn(2, C, 4, 4, dtype=torch.bfloat16), torch.randn(2, C, 4, 4)
    assert tail(y, x).dtype is torch.float32
    torch.testing.assert_close(tail(y, x), F.relu(tail.norm(y.float()) + x), rtol=1e-5, atol=1e-5)


def _unusual() -> dict[str, tuple[ResidualTail, str]]:
    hooked = ResidualTail(nn.BatchNorm2d(C))
    hooked.norm.register_forward_hook(lambda *_: None)
    return {
        "instance norm": (ResidualTail(nn.InstanceNorm2d(C)), "no kernel for InstanceNorm2d"),
        "tanh": (ResidualTail(activation=nn.Tanh()), r"no kernel for Tanh"),
        "approximate gelu": (ResidualTail(activation=nn.GELU("tanh")), "no kernel for GELU"),
        "hook": (hooked, "a hook on norm"),
    }


@pytest.mark.parametrize("name", ["instance norm", "tanh", "approximate gelu", "hook"])
def test_unusual_parts_run_unfused(name):
    tail, reason = _unusual()[name]
    y, x = torch.randn(2, C, 4, 4), torch.randn(2, C, 4, 4)
    assert reason in tail.unfused_reason(y, x)
    before = path_counts["tail_unfused"]
    out = tail(y, x)
    assert path_counts["tail_unfused"] == before + 1 and out.shape == x.shape


def test_empty_batch_and_one_value_a_channel():
    tail = ResidualTail(nn.BatchNorm2d(C), activation=nn.ReLU())
    assert tail(torch.randn(0, C, 3, 3), torch.randn(0, C, 3, 3)).shape == (0, C, 3, 3)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        tail(torch.randn(1, C, 1, 1), torch.randn(1, C, 1, 1))


def test_selected_backends_agree():
    tail, given = _make("squeeze-and-excitation", torch.float32, torch.channels_last)
    outs = []
    for backend in ("cpu", "reference"):
        with fusedres.use_backend(backend):
            outs.append(tail(*given.values()))
    torch.testing.assert_close(*outs)


Y = torch.randn(2, C, 4, 4)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "shortcut must have shape .* was its projection skipped", lambda: ResidualTail()(Y, Y[:, :, ::2])),
        (ValueError, r"scale must be a scalar, \(24,\), \(2, 1\) or", lambda: ResidualTail()(Y, Y, torch.ones(3, C))),
        (ValueError, "carry must be None without a shortcut", lambda: ResidualTail()(Y, None, None, torch.ones(C))),
        (ValueError, "a coupled gate takes shortcut and scale", lambda: ResidualTail(gate="coupled")(Y, Y)),
        (ValueError, "scale must be logits of shape", lambda: ResidualTail(gate="logits")(Y, Y, torch.ones(C))),
        (ValueError, "gate must be one of scale, logits, coupled", lambda: ResidualTail(gate="soft")),
        (ValueError, "branch must have shape", lambda: ResidualTail()(Y[0])),
        (TypeError, "branch must be float32", lambda: ResidualTail()(Y.int(), Y.int())),
    ],
)
def test_errors(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_statistics_are_kept_if_a_call_fails(monkeypatch):
    from fusedres.kernels.gated_tail import cpu

    tail, given = _make("resnet", torch.float32, torch.channels_last)
    before = copy.deepcopy(tail.state_dict())

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cpu._C, "gated_tail", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        tail(given["branch"], given["shortcut"])
    assert all(torch.equal(value, before[key]) for key, value in tail.state_dict().items())


def test_saved_tensors_that_come_back_strided():
    """Hooks may return saved tensors, the bits of a ReLU among them, with other strides."""
    tail = ResidualTail(nn.BatchNorm2d(4), activation=nn.ReLU()).double()
    y, x = (torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: torch.stack([t, t], -1)[..., 0]):
        out = tail(y, x)
    got = torch.autograd.grad(out.square().sum(), (y, x))
    expected = torch.autograd.grad(torch.relu(tail.norm(y) + x).square().sum(), (y, x))
    torch.testing.assert_close(got, expected)


def test_batch_of_gradients_without_the_shortcut_s_values():
    tail = ResidualTail(nn.BatchNorm2d(4), activation=nn.ReLU()).double()
    y, x = (torch.randn(3, 4, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    grads = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    got = torch.autograd.grad(tail(y, x), (y, x), grads, is_grads_batched=True)
    out = torch.relu(tail.norm(y) + x)
    torch.testing.assert_close(got, torch.autograd.grad(out, (y, x), grads, is_grads_batched=True))
