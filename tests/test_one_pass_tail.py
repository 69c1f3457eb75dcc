"""The one-pass tail, forward and backward, against float64 autograd of convolution + BatchNorm + shortcut + ReLU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from op_inputs import activation, call, channels, device, state, vector
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedres import ops
from fusedres.kernels.reference_core import unpack_bits
from fusedres.values import Centred, Folded, Gated, Gram, GramState, Norm, ShortcutInput

BACKENDS = ("reference", "triton")
EPS = 1e-5
# N, C, P, Q, K; stride of z; kind of shortcut, its channels and stride; whether BatchNorm and ReLU come before z
CASES = {
    "identity": (4, 16, 7, 7, 64, 1, "shortcut", 64, 1, True),
    "padded": (3, 3, 6, 5, 12, 1, "shortcut", 5, 2, True),
    "normalised": (2, 65, 5, 5, 129, 1, "normalised", 129, 1, False),
    "one channel": (1, 1, 9, 7, 3, 1, "shortcut", 3, 1, True),
    "projection": (2, 16, 7, 7, 65, 1, "projection", 24, 2, True),
    "strided": (2, 129, 5, 4, 3, 2, "projection", 3, 1, False),
    "tiles": (3, 64, 8, 8, 128, 1, "projection", 65, 1, True),
}


def _close(name, got, want, tolerance):
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    error = (got.double().cpu() - want).abs()
    scale = want.abs().max() + 1e-300
    index = torch.unravel_index(error.nan_to_num(1e300).argmax(), error.shape) if error.numel() else ()
    assert error.numel() == 0 or (error.max() / scale) < tolerance, (
        f"{name}: relative error {(error.max() / scale).item():.2e}, allowed {tolerance:.1e}, worst at "
        f"{tuple(int(i) for i in index)}: got {got[index].item()}, want {want[index].item()}"
    )


def _far(shape, dtype, mean, std, seed):
    """Return normal values around a mean, with another scale in each channel."""
    return (activation(shape, torch.float64, seed) * std + mean).to(dtype).contiguous(memory_format=torch.channels_last)


def _inputs(case, dtype, mean=None, std=1.0):
    n, c, p, q, k, stride, kind, other, other_stride, with_state = CASES[case]
    size = (n, c, p * stride - (stride > 1), q * stride)
    i = SimpleNamespace(k=k, stride=stride, kind=kind, other_stride=other_stride, count=n * p * q)
    i.z = activation(size, dtype) if mean is None else _far(size, dtype, mean, std, 0)
    i.state = state(c, dtype) if with_state else None
    other_size = (n, other, p * other_stride - (other_stride > 1), q * other_stride)
    i.other = activation(other_size, dtype, 1) if mean is None else _far(other_size, dtype, mean, std, 1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    i.weight = (activation((k, c, 1, 1), torch.float64, 2) / c**0.5).to(wide)
    i.gamma, i.beta = vector(k, wide, 3), vector(k, wide, 4)
    i.other_weight = (activation((k, other, 1, 1), torch.float64, 5) / other**0.5).to(wide)
    i.other_gamma, i.other_beta = vector(k, wide, 6), vector(k, wide, 7)
    i.other_state = state(k, dtype, 8)
    i.grad = activation((n, k, p, q), dtype, 9)
    return i


def _to(inputs, where):
    return SimpleNamespace(**{n: v.to(where) if isinstance(v, torch.Tensor) else v for n, v in vars(inputs).items()})


def _branch(z, affine, stride, weight, gamma, beta, count, dtype, backend):
    """Return the parameters of one 1x1 convolution with its BatchNorm."""
    b = SimpleNamespace()
    b.pivot, b.total, gram = ops.gram_statistics(z, affine, stride, backend=backend)
    norm = Norm(gamma, beta, None, None, None, 0.1, EPS)
    b.state, b.projected = ops.one_pass_statistics(weight, Gram(b.pivot, b.total, gram), count, norm, backend=backend)
    b.folded, b.offset = ops.one_pass_fold(weight, b.state, b.total, count, dtype, backend=backend)
    return b


def _run(i, backend):
    """Run forward and backward through the ops; return all results by name."""
    dtype, r = i.z.dtype, {}
    main = _branch(i.z, i.state, i.stride, i.weight, i.gamma, i.beta, i.count, dtype, backend)
    if i.kind == "projection":
        arguments = (i.other_weight, i.other_gamma, i.other_beta, i.count, dtype, backend)
        other = _branch(i.other, None, i.other_stride, *arguments)
        x = Centred(i.other, other.pivot, i.other_stride)
        shortcut = None, x, Folded(other.folded, other.offset)
    else:
        x = None
        other_state = i.other_state if i.kind == "normalised" else None
        shortcut = ShortcutInput(i.other, other_state, i.other_stride), None, None
    z = Centred(i.z, main.pivot, i.stride)
    folded = Folded(main.folded, main.offset)
    r["out"], r["gate"] = ops.one_pass_tail(z, i.state, folded, *shortcut, True, backend=backend)
    gated = Gated(i.grad, r["gate"])
    cross, x_cross, r["beta"] = ops.one_pass_reduce(gated, z, i.state, x, backend=backend)

    def products(cross, weight, branch):
        gram_state = GramState(branch.state, branch.projected, branch.total)
        arguments = (cross, r["beta"], weight, branch.folded, gram_state, i.count, dtype)
        return ops.one_pass_products(*arguments, backend=backend)

    r["weight"], r["gamma"], *rest = products(cross, i.weight, main)
    masked = i.state is not None
    r["z"], r["partials"] = ops.one_pass_dgrad(gated, z, i.state, main.folded, *rest, masked, backend=backend)
    if i.kind == "projection":
        r["other_weight"], r["other_gamma"], *rest = products(x_cross, i.other_weight, other)
        r["other"], _ = ops.one_pass_dgrad(gated, x, None, other.folded, *rest, backend=backend)
    else:
        assert x_cross.shape == (i.k, 0)
    return r


def _oracle(i, gate):
    """Compute the same in float64 by autograd; in backward the gate decides what passes the last ReLU."""
    z = i.z.double()[:, :, :: i.stride, :: i.stride]
    if i.state is not None:
        z = z * channels(i.state[2]) + channels(i.state[3])
    other = i.other.double()[:, :, :: i.other_stride, :: i.other_stride]
    leaves = {"z": z, "other": other}
    leaves |= {n: getattr(i, n).double() for n in ("weight", "gamma", "beta", "other_weight", "other_gamma")}
    leaves = {n: v.detach().clone().requires_grad_() for n, v in leaves.items()}
    h = leaves["z"] if i.state is None else leaves["z"].relu()

    def norm(h, name, beta):
        y = F.conv2d(h, leaves[f"{name}weight"])
        return F.batch_norm(y, None, None, leaves[f"{name}gamma"], beta, True, 0.0, EPS)

    before = norm(h, "", leaves["beta"])
    if i.kind == "projection":
        before = before + norm(leaves["other"], "other_", i.other_beta.double())
    elif i.kind == "normalised":
        before = before + leaves["other"] * channels(i.other_state[2]) + channels(i.other_state[3])
    else:
        before = before + F.pad(leaves["other"], (0, 0, 0, 0, 0, i.k - other.shape[1]))
    before.backward(i.grad.double() * unpack_bits(gate, i.k))
    names = [n for n in leaves if i.kind == "projection" or not n.startswith("other")]
    r = {n: leaves[n].grad for n in names}
    if i.state is not None:
        raw = i.z.double()[:, :, :: i.stride, :: i.stride]
        normalised = (raw - channels(i.state[0])) * channels(i.state[1])
        r["partials"] = torch.stack([(r["z"] * v).sum((0, 2, 3)) for v in (torch.ones_like(raw), normalised)])
    return before.detach(), r


def _compare(i, got, tolerance):
    gate = got["gate"].cpu()
    before, want = _oracle(i, gate)
    _close("out", got["out"], before.relu(), tolerance)
    assert got["out"].is_contiguous(memory_format=torch.channels_last) and got["out"].dtype == i.z.dtype
    open_ = unpack_bits(gate, i.k)
    assert torch.equal(open_, ~(got["out"].cpu() <= 0)), "the bits are not those of out"
    wrong = before[open_ != ~(before <= 0)].abs()
    assert wrong.numel() == 0 or wrong.max() < tolerance * before.abs().max()
    used = gate.new_zeros(()) if i.k % 8 == 0 else gate[..., -1] >> (i.k % 8)
    assert not used.any(), "bits beyond the last channel"
    for name, value in want.items():
        found = got[name]
        if name == "partials":
            assert found.shape == (-(-i.count // 64), 2, i.z.shape[1])
            found = found.double().sum(0)
        _close(f"grad_{name}", found, value, tolerance * (50 if name == "partials" else 10))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_tail_is_convolution_batch_norm_shortcut_relu(backend, dtype, case):
    i = _inputs(case, dtype)
    got = _run(_to(i, device(backend, dtype)), backend)
    _compare(i, got, 2e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mean", "std"), [(30.0, 1.0), (1e4, 0.1)])
@pytest.mark.parametrize("case", ["strided", "normalised"])
def test_pivot_far_from_zero(backend, mean, std, case):
    i = _inputs(case, torch.float32, mean, std)
    if case == "normalised":
        i.other = activation(tuple(i.other.shape), torch.float32, 1)
    _compare(i, _run(_to(i, device(backend)), backend), 2e-5)


def _half_problem(dtype):
    """Return inputs where the first rows of z lie far from the others: the pivot helps little, so rounding matters."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, 32, 8, 8, generator=generator, dtype=torch.float64) + 10
    z[0, :, 0] -= 10
    i = _inputs("identity", dtype)
    i.z, i.state, i.count = z.to(dtype).contiguous(memory_format=torch.channels_last), None, 128
    i.weight = (torch.randn(64, 32, 1, 1, generator=generator, dtype=torch.float64) / 32**0.5).float()
    i.other, i.grad = activation((2, 64, 8, 8), dtype, 1), activation((2, 64, 8, 8), dtype, 9)
    return i


def _unfused(i, gate):
    """Compute the results with torch's own convolution and BatchNorm in the tested dtype."""
    z, weight = i.z.clone().requires_grad_(), i.weight.to(i.z.dtype).requires_grad_()
    y = F.batch_norm(F.conv2d(z, weight), None, None, i.gamma, i.beta, True, 0.0, EPS)
    (y + i.other).backward(i.grad * unpack_bits(gate, i.k))
    return {"out": (y + i.other).relu().detach(), "z": z.grad, "weight": weight.grad}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_shifts_no_mean(backend, dtype):
    i = _half_problem(dtype)
    got = _run(_to(i, device(backend, dtype)), backend)
    gate = got["gate"].cpu()
    before, want = _oracle(i, gate)
    want["out"] = before.relu()
    for name, eager in _unfused(i, gate).items():
        fused = (got[name].double().cpu() - want[name]).norm() / want[name].norm()
        unfused = (eager.double() - want[name]).norm() / want[name].norm()
        assert fused <= unfused, f"{name}: relative error {fused:.2e}, unfused {unfused:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_constants_come_from_what_is_rounded(backend):
    where = device(backend)
    i = _half_problem(torch.float16)
    on = _to(i, where)
    main = _branch(on.z, None, 1, on.weight, on.gamma, on.beta, i.count, torch.float16, backend)
    cross, sum_d = torch.randn(64, 32), vector(64, seed=20)
    gram_state = GramState(main.state, main.projected, main.total)
    arguments = (cross.to(where), sum_d.to(where), on.weight, main.folded, gram_state, i.count, torch.float16)
    *_, quadratic, constant = ops.one_pass_products(*arguments, backend=backend)
    main = _to(main, "cpu")
    exact = main.state[2].double()[:, None] * i.weight.double().flatten(1)
    beta = (main.state[3] + main.state[2] * main.state[0]).double()
    centre = main.total / i.count
    assert (main.folded.double() != exact).any()
    from_rounded, from_exact = beta - main.folded.double() @ centre, beta - exact @ centre
    assert (main.offset.double() - from_rounded).abs().max() < 0.01 * (from_rounded - from_exact).abs().max()
    want = centre @ quadratic.double().cpu() - (sum_d.double() / i.count) @ main.folded.double()
    assert (constant.double().cpu() - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_pass(backend):
    where = device(backend)
    z = activation((1, 16, 4, 4), torch.float32).to(where)
    pivot, folded, offset = torch.zeros(16, device=where), torch.eye(16, device=where), torch.zeros(16, device=where)
    shortcut = torch.zeros_like(z)
    shortcut[0, 3, 1, 2], shortcut[0, 5, 0, 0], shortcut[0, 6, 0, 0] = torch.nan, torch.inf, -torch.inf
    out, gate = ops.one_pass_tail(
        Centred(z, pivot), None, Folded(folded, offset), ShortcutInput(shortcut), None, None, True, backend=backend
    )
    want = (z + shortcut).relu()
    assert torch.allclose(out, want, equal_nan=True)
    open_ = unpack_bits(gate, 16)
    assert open_[0, 3, 1, 2] and open_[0, 5, 0, 0] and not open_[0, 6, 0, 0]
    z[0, 2, 3, 3] = torch.nan
    out, _ = ops.one_pass_tail(
        Centred(z, pivot),
        torch.ones(4, 16, device=where),
        Folded(folded, offset),
        ShortcutInput(shortcut),
        None,
        None,
        backend=backend,
    )
    assert out[0, :, 3, 3].isnan().all() and out.isnan().sum() == 17


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_mask(backend):
    where = device(backend)
    i = _to(_inputs("identity", torch.float32), where)
    main = _branch(i.z, i.state, 1, i.weight, i.gamma, i.beta, i.count, torch.float32, backend)
    folded, shortcut = Folded(main.folded, main.offset), (ShortcutInput(i.other), None, None)
    arguments = (Centred(i.z, main.pivot), i.state, folded, *shortcut)
    out, gate = ops.one_pass_tail(*arguments, backend=backend)
    assert gate.shape == (0,) and gate.dtype == torch.uint8
    assert torch.equal(out, ops.one_pass_tail(*arguments, with_mask=True, backend=backend)[0])


def test_same_bits_at_every_call():
    i = _to(_inputs("projection", torch.float32), device("triton"))
    first, second = _run(i, "triton"), _run(i, "triton")
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_fakes_are_like_the_results():
    for case in ("projection", "identity"):
        i = _inputs(case, torch.float32)
        i.weight = i.weight.to(memory_format=torch.channels_last)
        real = _run(i, "reference")
        with FakeTensorMode() as mode:
            faked = {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in vars(i).items()}
            for name, fake in _run(SimpleNamespace(**faked), "reference").items():
                assert fake.shape == real[name].shape and fake.dtype == real[name].dtype, name
                assert fake.stride() == real[name].stride(), name


def test_errors():
    i = _inputs("projection", torch.float32)
    main = _branch(i.z, i.state, 1, i.weight, i.gamma, i.beta, i.count, torch.float32, "reference")
    plain = {"z": i.z, "z_state": i.state, "z_pivot": main.pivot, "folded": main.folded, "offset": main.offset}
    plain["with_mask"] = False
    out = torch.zeros_like(i.grad)
    gate = torch.zeros(2, 7, 7, 9, dtype=torch.uint8)
    back = {"grad": i.grad, "gate": gate, "z": i.z, "z_state": i.state, "z_pivot": main.pivot}
    one = torch.ones(1)

    def tail(**change):
        return lambda: call("one_pass_tail", "reference", **plain | change)

    def reduce(**change):
        return lambda: call("one_pass_reduce", "reference", **back | change)

    cases = [
        (ValueError, "one_pass_tail: shortcut must be given where x is None", tail()),
        (ValueError, "one_pass_tail: x_pivot must be given with x", tail(x=i.z)),
        (ValueError, "one_pass_tail: shortcut must have shape", tail(shortcut=i.other)),
        (
            ValueError,
            r"one_pass_tail: shortcut must have shape \(2, 65, 7, 7\) like the output",
            tail(shortcut=out[:, :64].clone(), shortcut_state=torch.ones(4, 65)),
        ),
        (TypeError, "one_pass_tail: shortcut must be", tail(shortcut=out.double())),
        (ValueError, "one_pass_tail: z_pivot must", tail(z_pivot=one, shortcut=out)),
        (ValueError, "one_pass_reduce: gate must", reduce(grad=out, gate=gate[1:])),
        (ValueError, "one_pass_reduce: z must .* 13 to 14", reduce(z_stride=2)),
        (ValueError, "one_pass_reduce: x_pivot must be given", reduce(x=i.z)),
        (
            ValueError,
            "one_pass_dgrad: masked must be False",
            lambda: ops.one_pass_dgrad(
                Gated(i.grad, gate), Centred(i.z, main.pivot), None, main.folded, torch.eye(16), main.pivot, True,
                backend="reference",
            ),
        ),
        (
            ValueError,
            "one_pass_fold: conv_weight must have shape",
            lambda: ops.one_pass_fold(
                torch.ones(4, 4, 3, 3), main.state, main.total, 8, torch.float32, backend="reference"
            ),
        ),
        (
            TypeError,
            "one_pass_fold: state must be",
            lambda: ops.one_pass_fold(i.weight, main.state, main.total, 8, torch.float64, backend="reference"),
        ),
        (
            ValueError,
            "one_pass_fold: count must be",
            lambda: ops.one_pass_fold(i.weight, main.state, main.total, 0, torch.float32, backend="reference"),
        ),
        (
            ValueError,
            "one_pass_products: sum_d must have shape",
            lambda: ops.one_pass_products(
                i.weight[:, :, 0, 0].contiguous(), one, i.weight, main.folded,
                GramState(main.state, main.projected, main.total), 98, torch.float32, backend="reference",
            ),
        ),
        (RuntimeError, "there is no cpu backend", lambda: call("one_pass_tail", "cpu", **plain, shortcut=out)),
    ]  # fmt: skip
    for error, message, wrong in cases:
        with pytest.raises(error, match=message):
            wrong()
