"""The steps of BatchNorm's backward: each against float64, and all together against autograd of the definition."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, EPS, SHAPES, activation, assert_near, backends_of, channels, device, state, vector
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedres import ops
from fusedres.kernels.reference_core import pack_bits
from fusedres.kernels.triton_core.launch import record_launches
from fusedres.ops.launch import launches
from fusedres.values import BnBranch, BnGradient, Gated, Gradient, Norm, NormState, Raw, ShortcutGradient

BACKENDS = backends_of("bn_backward_reduce", "bn_backward_coefficients", "bn_backward_apply")


def _gate(active, kind, dtype):
    if kind == "bits":
        return pack_bits(active)
    return active.to(dtype).contiguous(memory_format=torch.channels_last) if kind == "output" else None


def _inputs(shape, dtype, kind, place):
    """Return grad, x, the shortcut's x, the gate, and d in float64."""
    grad, x, other = (activation(shape, dtype, seed).to(place) for seed in (1, 2, 3))
    active = activation(shape, torch.float32, 4).to(place) > 0
    d = grad.double() if kind is None else grad.double() * active
    return grad, x, other, _gate(active, kind, dtype), d


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _product(d, x, affine):
    """Return Σd·x̂ and Σ|terms|, in float64."""
    mean, invstd = channels(affine[0]), channels(affine[1])
    terms = d.abs() * ((x.double() - mean) * invstd).abs() + d.abs() * (mean * invstd).abs()
    return (d * (x.double() - mean) * invstd).sum((0, 2, 3)), terms.sum((0, 2, 3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 17, 1, 1), (1, 3, 31, 13)])
@pytest.mark.parametrize(("kind", "projection"), [("bits", True), ("output", False), (None, True)])
def test_reduce(backend, dtype, shape, kind, projection):
    place = device(backend, dtype)
    grad, x, other, gate, d = _inputs(shape, dtype, kind, place)
    affine, other_affine = state(shape[1], dtype).to(place), state(shape[1], dtype, seed=9).to(place)
    shortcut = Raw(other, other_affine) if projection else None
    kept = grad.clone()
    partials = ops.bn_backward_reduce(Gated(grad, gate), Raw(x, affine), shortcut, backend=backend)
    assert torch.equal(grad, kept)
    assert partials.shape[1:] == (3 if projection else 2, shape[1]) and partials.dtype == _wide(dtype)
    sums = partials.double().sum(0)
    assert_near("sum d", sums[0], d.sum((0, 2, 3)), d.abs().sum((0, 2, 3)), dtype, 16)
    assert_near("sum d·x̂", sums[1], *_product(d, x, affine), dtype, 16)
    if projection:
        assert_near("sum d·x̂ shortcut", sums[2], *_product(d, other, other_affine), dtype, 16)
    again = ops.bn_backward_reduce(Gated(grad, gate), Raw(x, affine), shortcut, backend=backend)
    assert torch.equal(partials, again)
    grad, gate, x, affine, other, other_affine = (
        None if t is None else t.to("meta") for t in (grad, gate, x, affine, other, other_affine)
    )
    shortcut = Raw(other, other_affine) if projection else None
    meta = ops.bn_backward_reduce(Gated(grad, gate), Raw(x, affine), shortcut, backend=backend)
    assert meta.shape == partials.shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bits", "output"])
def test_each_tile_sums_its_own_rows(backend, kind):
    place = device(backend)
    grad, x, _, gate, d = _inputs((3, 24, 17, 13), torch.float32, kind, place)
    partials = ops.bn_backward_reduce(Gated(grad, gate), Raw(x, state(24, torch.float32).to(place)), backend=backend)
    rows = d.permute(0, 2, 3, 1).reshape(-1, 24)
    tile = {"reference": len(rows), "cpu": len(rows), "triton": 64, "cuda": 32}[backend]
    want = torch.stack([part.sum(0) for part in rows.split(tile)])
    assert len(partials) == len(want)
    assert_near("sum d", partials[:, 0], want, want.abs() + 8, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tiles", "width"), [(1, 1), (7, 65), (300, 3), (6000, 64), (515, 700), (0, 5)])
@pytest.mark.parametrize(
    ("batch_statistics", "shortcut"), [(True, None), (False, None), (True, True), (True, False), (False, True)]
)
def test_coefficients(backend, dtype, tiles, width, batch_statistics, shortcut):
    place = device(backend, dtype)
    generator = torch.Generator().manual_seed(tiles)
    partials = torch.randn((tiles, 2 if shortcut is None else 3, width), generator=generator, dtype=dtype).to(place)
    affine, other_affine = state(width, dtype).to(place), state(width, dtype, seed=9).to(place)
    states = [NormState(affine, batch_statistics)]
    if shortcut is not None:
        states.append(NormState(other_affine, shortcut))
    count = 12 * max(tiles, 1)
    sums, *coefficients = ops.bn_backward_coefficients(partials, count, *states, backend=backend)
    want, terms = partials.double().sum(0), partials.double().abs().sum(0)
    assert_near("sums", sums, want, terms, dtype, 16)
    branches = [(affine, batch_statistics, 1)] + ([] if shortcut is None else [(other_affine, shortcut, 2)])
    for got, (branch, batch, row) in zip(coefficients, branches, strict=False):
        mean, invstd, scale, _ = branch.double()
        factor = invstd * batch / count
        expected = torch.stack((scale, want[0] * batch / count, mean, want[row] * factor))
        bounds = torch.stack((scale.abs(), terms[0] * batch / count, mean.abs(), terms[row] * factor))
        assert_near("coefficients", got, expected, bounds, dtype, 16)
    if shortcut is None:
        assert coefficients[1].numel() == 0
    again = ops.bn_backward_coefficients(partials, count, *states, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(again, (sums, *coefficients), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 17, 1, 1)])
@pytest.mark.parametrize(("kind", "projection"), [("bits", True), ("output", True), ("bits", False), (None, False)])
def test_apply(backend, dtype, shape, kind, projection):
    place = device(backend, dtype)
    grad, x, other, gate, d = _inputs(shape, dtype, kind, place)
    one, two = (state(shape[1], dtype, seed).to(place) for seed in (5, 6))
    shortcut = BnGradient(other, two) if projection else None
    kept = [tensor.clone() for tensor in (grad, x, other)]
    got = ops.bn_backward_apply(Gradient(grad, gate, x, one), shortcut, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip((grad, x, other), kept, strict=True))
    for name, result, raw, row in (("grad_x", got[0], x, one), ("grad_shortcut", got[1], other, two)):
        if name == "grad_shortcut" and not projection:
            assert result.numel() == 0
            continue
        a, c1, mean, k = (channels(value) for value in row)
        pull = (raw.double() - mean) * k
        terms = a.abs() * (d.abs() + c1.abs() + pull.abs() + (mean * k).abs())
        assert_near(name, result, a * (d - c1 - pull), terms, dtype, 8)
        assert result.dtype == dtype and result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["bits", "output"])
@pytest.mark.parametrize("shape", [(4, 32, 9, 11), (3, 65, 7, 7)])
def test_the_three_together_are_autograds(backend, dtype, kind, shape):
    """The reference is relu(bn(x) + bn_d(x_d)) with batch statistics, differentiated by autograd in float64."""
    place = device(backend, dtype)
    x, other, grad = (activation(shape, dtype, seed).to(place) for seed in (1, 2, 3))
    width, count = shape[1], x.numel() // shape[1]
    leaves = [x.double().requires_grad_(), other.double().requires_grad_()]
    parameters = [vector(width, torch.float64, seed).to(place).requires_grad_() for seed in (1, 2, 3, 4)]
    norms = [
        torch.nn.functional.batch_norm(leaf, None, None, weight, bias, training=True, eps=1e-5)
        for leaf, weight, bias in zip(leaves, parameters[::2], parameters[1::2], strict=True)
    ]
    out = (norms[0] + norms[1]).relu()
    out.backward(grad.double())
    states = []
    for leaf, weight, bias in zip(leaves, parameters[::2], parameters[1::2], strict=True):
        mean, var = leaf.mean((0, 2, 3)), leaf.var((0, 2, 3), correction=0)
        invstd = (var + 1e-5).rsqrt()
        states.append(
            torch.stack((mean, invstd, weight * invstd, bias - weight * invstd * mean)).detach().to(_wide(dtype))
        )
    gate = _gate(out.detach() > 0, kind, dtype)
    partials = ops.bn_backward_reduce(Gated(grad, gate), Raw(x, states[0]), Raw(other, states[1]), backend=backend)
    sums, one, two = ops.bn_backward_coefficients(
        partials, count, NormState(states[0], True), NormState(states[1], True), backend=backend
    )
    grads = ops.bn_backward_apply(Gradient(grad, gate, x, one), BnGradient(other, two), backend=backend)
    scale = EPS[dtype] * 64
    for got, leaf in zip(grads, leaves, strict=True):
        assert (got.double() - leaf.grad).abs().max() <= scale * leaf.grad.abs().max()
    for got, leaf in zip(sums, (parameters[1], parameters[0], parameters[2]), strict=True):
        assert (got.double() - leaf.grad).abs().max() <= scale * count**0.5 * grad.double().abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_output_lets_the_gradient_pass(backend):
    place = device(backend)
    grad, x, _, _, _ = _inputs((1, 18, 2, 2), torch.float32, None, place)
    affine = state(18, torch.float32).to(place)
    output = torch.zeros_like(x)
    output[0, 17, 1, 0] = torch.nan
    sums = ops.bn_backward_reduce(Gated(grad, output), Raw(x, affine), backend=backend).sum(0)
    assert sums[0, 17] == grad[0, 17, 1, 0] and not sums[0, :17].any()
    coefficients = torch.stack((affine[2], affine[0] * 0, affine[0], affine[0] * 0))
    grad_x, _ = ops.bn_backward_apply(Gradient(grad, output, x, coefficients), backend=backend)
    assert grad_x[0, 17, 1, 0] == coefficients[0, 17] * grad[0, 17, 1, 0] and grad_x.count_nonzero() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_in_the_gradient_stay_where_the_gate_is_closed(backend):
    place = device(backend)
    grad, x, _, _, _ = _inputs((1, 18, 2, 2), torch.float32, None, place)
    grad[0, 2, 0, 0], grad[0, 3, 0, 0] = torch.nan, torch.inf
    active = torch.ones_like(grad, dtype=torch.bool)
    active[0, 2:4, 0, 0] = False
    affine = state(18, torch.float32).to(place)
    for kind in ("bits", "output"):
        gate = _gate(active, kind, torch.float32)
        assert ops.bn_backward_reduce(Gated(grad, gate), Raw(x, affine), backend=backend).isfinite().all()
        assert ops.bn_backward_apply(Gradient(grad, gate, x, affine), backend=backend)[0].isfinite().all()
    assert ops.bn_backward_reduce(Gated(grad, None), Raw(x, affine), backend=backend).sum(0)[0, 2].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_x_does_not_reach_the_gradient_of_constant_statistics(backend):
    place = device(backend)
    grad, x, _, _, _ = _inputs((2, 16, 3, 3), torch.float32, None, place)
    affine = state(16, torch.float32).to(place)
    x[0, 5, 1, 1], x[0, 6, 1, 1] = torch.nan, torch.inf
    partials = ops.bn_backward_reduce(Gated(grad, None), Raw(x, affine), backend=backend)
    sums, coefficients, _ = ops.bn_backward_coefficients(partials, 18, NormState(affine, False), backend=backend)
    assert sums[1, 5].isnan()
    grad_x, _ = ops.bn_backward_apply(Gradient(grad, None, x, coefficients), backend=backend)
    assert torch.equal(grad_x, affine[2].view(1, -1, 1, 1) * grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("projection", [True, False])
def test_fake_results_have_the_shapes_of_real_ones(backend, projection):
    place = device(backend)
    grad, x, other, gate, _ = _inputs((3, 24, 17, 13), torch.float32, "bits", place)
    affine = state(24, torch.float32).to(place)

    def steps(grad, gate, x, other, affine):
        shortcut = Raw(other, affine) if projection else None
        partials = ops.bn_backward_reduce(Gated(grad, gate), Raw(x, affine), shortcut, backend=backend)
        states = NormState(affine, True), NormState(affine, False) if projection else None
        merged = ops.bn_backward_coefficients(partials, 663, *states, backend=backend)
        shortcut = BnGradient(other, merged[2]) if projection else None
        apply = ops.bn_backward_apply(Gradient(grad, gate, x, merged[1]), shortcut, backend=backend)
        return partials, *merged, *apply

    real = steps(grad, gate, x, other, affine)
    with FakeTensorMode() as mode:
        fake = steps(*(mode.from_tensor(tensor) for tensor in (grad, gate, x, other, affine)))
    for one, two in zip(fake, real, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype)


def test_errors():
    grad, x, other, gate, _ = _inputs((2, 8, 3, 3), torch.float32, "bits", "cpu")
    affine = state(8, torch.float32)
    with pytest.raises(ValueError, match="bn_backward_reduce: gate must have shape"):
        ops.bn_backward_reduce(Gated(grad, gate[:1]), Raw(x, affine), backend="reference")
    with pytest.raises(ValueError, match="shortcut_state must be given with shortcut, got None; pass both or neither"):
        ops.bn_backward_reduce(Gated(grad, gate), Raw(x, affine), Raw(other, None), backend="reference")
    with pytest.raises(ValueError, match="bn_backward_apply: shortcut_coefficients must be None without shortcut,"):
        ops.bn_backward_apply(Gradient(grad, gate, x, affine), BnGradient(None, affine), backend="reference")
    with pytest.raises(TypeError, match=r"bn_backward_apply: coefficients must be torch\.float32"):
        ops.bn_backward_apply(Gradient(grad, gate, x, affine.double()), backend="reference")
    with pytest.raises(ValueError, match="bn_backward_apply: shortcut must have shape"):
        ops.bn_backward_apply(Gradient(grad, gate, x, affine), BnGradient(other[:1], affine), backend="reference")
    partials = torch.zeros(4, 2, 8)
    with pytest.raises(ValueError, match=r"partials must have shape \(T, 3, C\) with a shortcut, got \(4, 2, 8\)"):
        ops.bn_backward_coefficients(
            partials, 18, NormState(affine, True), NormState(affine, False), backend="reference"
        )
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        ops.bn_backward_coefficients(partials, 0, NormState(affine, True), backend="reference")
    with pytest.raises(TypeError, match="partials must be float32 or float64"):
        ops.bn_backward_coefficients(partials.half(), 18, NormState(affine, True), backend="reference")
    with pytest.raises(ValueError, match=r"bn_backward_coefficients: state must have shape \(4, 8\)"):
        ops.bn_backward_coefficients(partials, 18, NormState(affine[:2], True), backend="reference")
    with pytest.raises(RuntimeError, match="there is no cpu backend; use 'reference'"):
        ops.bn_finalize(
            partials, torch.ones(len(partials)), Norm(None, None, None, None, None, 0.1, 1e-5), backend="cpu"
        )


@pytest.mark.parametrize("backend", backends_of("bn_relu_backward_", "bn_add_relu_backward", "relu_backward"))
def test_the_sums_of_an_empty_batch_are_zero(backend):
    """A process with no images still takes part in the sums over all processes."""
    place = device(backend)
    x = torch.empty((0, 8, 3, 3), device=place).to(memory_format=torch.channels_last)
    bits = torch.empty((0, 3, 3, 1), dtype=torch.uint8, device=place)
    branch = BnBranch(x, torch.ones((4, 8), device=place), False)
    for poison in (torch.full((999,), torch.nan), torch.full((24,), torch.nan)):  # freed memory for the sums
        del poison
        assert not ops.bn_relu_backward_(x.clone(), branch, True, True, backend=backend)[:2].any()
        assert not ops.bn_add_relu_backward(Gated(x, bits), branch, branch, True, backend=backend)[2].any()
        assert not ops.relu_backward(Gated(x, bits), backend=backend)[1].any()
        assert not ops.bn_backward_reduce(Gated(x, bits), Raw(x, branch.state), backend=backend).sum(0).any()


def test_candidates_are_worked_out_once():
    """Computing them at every launch would cost more than the launch itself."""
    x, affine = torch.empty((2, 64, 7, 7), device="meta"), torch.empty(4, 64, device="meta")
    x = x.to(memory_format=torch.channels_last)
    weight = torch.empty((64, 64, 3, 3), device="meta")
    run = launches("triton")
    with record_launches() as made:
        for _ in range(2):
            run.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5))
            run.bn_relu(x, affine, None, 1)
            run.bn_add_relu_backward(Gated(x, x), BnBranch(x, affine, True), None, True)
            run.shortcut_grad_(x, ShortcutGradient(x, None))
            run.conv_weights([weight], torch.float32)
    first, second = made[: len(made) // 2], made[len(made) // 2 :]
    assert [launch.name for launch in first] == [launch.name for launch in second] and len(first) == 8
    assert all(a.candidates is b.candidates for a, b in zip(first, second, strict=True))
