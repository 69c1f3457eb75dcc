"""Backward of ReLU and BatchNorm: functional and in place, with one and two branches, against float64."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, SHAPES, activation, assert_near, backends_of, channels, device, state

from fusedres import ops
from fusedres.kernels.reference_core import pack_bits
from fusedres.values import BnBranch, Gated


def _branch(d, x, affine, batch_statistics):
    """Return grad_x, Σd·x̂, and the sums of |terms| of both, in float64."""
    mean, invstd, scale, _ = (channels(row) for row in affine)
    count = x.numel() // x.shape[1]
    normalised = (x.double() - mean) * invstd
    product, product_terms = (d * normalised).sum((0, 2, 3)), (d * normalised).abs().sum((0, 2, 3))
    grad, terms = scale * d, scale.abs() * d.abs()
    if batch_statistics:
        total = d.sum((0, 2, 3))
        grad = scale * (d - channels(total / count) - normalised * channels(product / count))
        absolute = d.abs().sum((0, 2, 3)) / count
        terms = scale.abs() * (
            d.abs() + channels(absolute) + (normalised.abs() + (mean * invstd).abs()) * channels(product_terms / count)
        )
    return grad, terms, product, product_terms


def _inputs(shape, dtype, place="cpu"):
    grad, x, other = (activation(shape, dtype, seed).to(place) for seed in (1, 2, 3))
    active = activation(shape, torch.float32, 4).to(place) > 0
    return grad, x, other, active


@pytest.mark.parametrize("backend", backends_of("bn_add_relu_backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("gate_kind", "projection", "batch_statistics"),
    [("bits", False, True), ("bits", True, True), ("output", False, False), (None, True, False)],
)
def test_tail(backend, dtype, shape, gate_kind, projection, batch_statistics):
    place = device(backend, dtype)
    grad, x, other, active = _inputs(shape, dtype, place)
    affine, other_affine = state(shape[1], dtype).to(place), state(shape[1], dtype, seed=9).to(place)
    gate = {"bits": pack_bits(active), "output": active.to(dtype).contiguous(memory_format=torch.channels_last)}.get(
        gate_kind or ""
    )
    d = grad.double() * active if gate is not None else grad.double()
    kept = grad.clone()
    branches = BnBranch(x, affine, batch_statistics), BnBranch(other, other_affine, True) if projection else None
    grad_x, grad_other, sums = ops.bn_add_relu_backward(Gated(grad, gate), *branches, backend=backend)
    assert torch.equal(grad, kept)
    want, terms, product, product_terms = _branch(d, x, affine, batch_statistics)
    assert_near("grad_x", grad_x, want, terms, dtype, 16)
    assert_near("sum d", sums[0], d.sum((0, 2, 3)), d.abs().sum((0, 2, 3)), dtype, 16)
    mean_terms = d.abs().sum((0, 2, 3)) * (affine[0] * affine[1]).double().abs()
    assert_near("sum d·x̂", sums[1], product, product_terms + mean_terms, dtype, 16)
    if projection:
        want, terms, product, product_terms = _branch(d, other, other_affine, True)
        assert_near("grad_shortcut", grad_other, want, terms, dtype, 16)
        mean_terms = d.abs().sum((0, 2, 3)) * (other_affine[0] * other_affine[1]).double().abs()
        assert_near("sum d·x̂ shortcut", sums[2], product, product_terms + mean_terms, dtype, 16)
    else:
        assert grad_other.numel() == 0
    in_place = ops.bn_add_relu_backward_(Gated(grad, gate), *branches, backend=backend)
    assert torch.equal(x, grad_x) and torch.equal(in_place[:2], sums[:2])
    if projection:
        assert torch.equal(other, grad_other)


@pytest.mark.parametrize("backend", backends_of("bn_add_relu_backward"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_inner(backend, dtype, shape, gated):
    place = device(backend, dtype)
    grad, x, _, _ = _inputs(shape, dtype, place)
    affine = state(shape[1], dtype).to(place)
    z = x.double() * channels(affine[2]) + channels(affine[3])
    d = torch.where(z <= 0, 0.0, grad.double()) if gated else grad.double()
    clear = z.abs() > 1e-5 if dtype != torch.float64 else z.abs() > 1e-13
    assert clear.all()
    want, terms, product, product_terms = _branch(d, x, affine, True)
    sums = ops.bn_relu_backward_(grad, BnBranch(x, affine, True), gated, backend=backend)
    assert_near("grad", grad, want, terms, dtype, 16)
    mean_terms = d.abs().sum((0, 2, 3)) * (affine[0] * affine[1]).double().abs()
    assert_near("sum d·x̂", sums[1], product, product_terms + mean_terms, dtype, 16)


@pytest.mark.parametrize("backend", backends_of("bn_relu_backward_add_"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inner_with_another_gradient(backend, dtype, shape):
    """The gradient of x is that of bn_relu_backward_, plus what else depends on x, rounded once."""
    place = device(backend, dtype)
    grad, x, added, _ = _inputs(shape, dtype, place)
    affine, kept = state(shape[1], dtype).to(place), added.clone()
    z = x.double() * channels(affine[2]) + channels(affine[3])
    want, terms, *_ = _branch(torch.where(z <= 0, 0.0, grad.double()), x, affine, True)
    alone = grad.clone()
    sums = ops.bn_relu_backward_add_(grad, BnBranch(x, affine, True), added, backend=backend)
    expected = ops.bn_relu_backward_(alone, BnBranch(x, affine, True), True, backend=backend)
    assert torch.equal(sums[:2], expected[:2]) and torch.equal(added, kept)
    if backend != "cpu":  # the others round the gradient of x first
        assert torch.equal(grad, alone.add_(added))
        return
    assert_near("grad", grad, want + added.double(), terms + added.double().abs(), dtype, 16)


@pytest.mark.parametrize("backend", backends_of("bn_add_relu_backward"))
def test_nan_in_the_gate_lets_the_gradient_pass(backend):
    place = device(backend)
    grad, x, _, _ = _inputs((1, 18, 2, 2), torch.float32, place)
    affine = state(18, torch.float32).to(place)
    output = torch.zeros_like(x)
    output[0, 17, 1, 0] = torch.nan
    _, _, sums = ops.bn_add_relu_backward(Gated(grad, output), BnBranch(x, affine, False), None, backend=backend)
    assert sums[0, 17] == grad[0, 17, 1, 0] and not sums[0, :17].any()


@pytest.mark.parametrize("backend", backends_of("bn_add_relu_backward"))
def test_nan_in_the_gradient_and_in_the_statistics_stays_in_its_channel(backend):
    place = device(backend)
    grad, x, _, _ = _inputs((2, 20, 3, 3), torch.float32, place)
    affine = state(20, torch.float32).to(place)
    grad[1, 3, 0, 2] = torch.nan
    affine[0, 7] = torch.nan
    grad_x, _, sums = ops.bn_add_relu_backward(Gated(grad, None), BnBranch(x, affine, True), None, backend=backend)
    bad = torch.zeros(20, dtype=torch.bool, device=place)
    bad[[3, 7]] = True
    assert torch.equal(grad_x.isnan().all(0).all(-1).all(-1), bad) and torch.equal(grad_x.isnan().any(0)[:, 0, 0], bad)
    assert torch.equal(sums[1].isnan(), bad)


@pytest.mark.parametrize("backend", backends_of("bn_add_relu_backward"))
@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_constant_statistics_keep_a_bad_x_out_of_the_gradient(backend, with_sums, bad):
    place = device(backend)
    grad, x, other, active = _inputs((2, 20, 3, 3), torch.float32, place)
    affine = state(20, torch.float32).to(place)
    x[0, 5, 1, 1] = bad
    gate = pack_bits(active)
    branches = BnBranch(x, affine, False), BnBranch(other, affine, False)
    grad_x, grad_other, sums = ops.bn_add_relu_backward(Gated(grad, gate), *branches, with_sums, backend=backend)
    want = grad * active * affine[2].view(1, -1, 1, 1)
    assert torch.equal(grad_x, want) and torch.equal(grad_other, want)
    if with_sums and active[0, 5, 1, 1]:
        assert not sums[1, 5].isfinite()


@pytest.mark.parametrize("backend", backends_of("bn_add_relu_backward"))
def test_constant_statistics_on_one_branch_only(backend):
    place = device(backend)
    grad, x, other, active = _inputs((3, 24, 5, 5), torch.float32, place)
    affine, other_affine = state(24, torch.float32).to(place), state(24, torch.float32, seed=9).to(place)
    gate, d = pack_bits(active), grad.double() * active
    for first, second in ((True, False), (False, True)):
        branches = BnBranch(x, affine, first), BnBranch(other, other_affine, second)
        grad_x, grad_other, _ = ops.bn_add_relu_backward(Gated(grad, gate), *branches, backend=backend)
        want, terms, _, _ = _branch(d, x, affine, first)
        assert_near("grad_x", grad_x, want, terms, torch.float32, 16)
        want, terms, _, _ = _branch(d, other, other_affine, second)
        assert_near("grad_shortcut", grad_other, want, terms, torch.float32, 16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 8, 5, 5), (3, 24, 9, 7), (2, 17, 6, 6), (1, 64, 1, 1)])
@pytest.mark.parametrize(
    ("kind", "projection", "batch_statistics"),
    [("bits", True, (True, True)), ("output", False, (True,)), (None, True, (False, True)), ("affine", False, (True,))],
)
def test_cuda_in_one_launch_is_bitwise_cuda_in_three(monkeypatch, dtype, shape, kind, projection, batch_statistics):
    """These are the two ways on a GPU, with every gate; there are more tiles than blocks that run at once."""
    place = device("cuda", dtype)
    cuda = pytest.importorskip("fusedres.kernels.bn_add_relu_backward.cuda")
    tensors = [tensor.to(place) for tensor in _inputs(shape, dtype)]
    affine, other_affine = state(shape[1], dtype).to(place), state(shape[1], dtype, seed=9).to(place)
    output = tensors[3].to(dtype).contiguous(memory_format=torch.channels_last)
    gate = {"bits": pack_bits(tensors[3]), "output": output}.get(kind or "")
    results = []
    for launches in (cuda.SEPARATE, cuda.FUSED, cuda.FUSED):
        monkeypatch.setattr(cuda, "launches", launches)
        grad, x, other = (tensor.clone() for tensor in tensors[:3])
        if kind == "affine":
            sums = ops.bn_relu_backward_(grad, BnBranch(x, affine, True), True, backend="cuda")
            assert torch.equal(x, tensors[1])
        else:
            shortcut = BnBranch(other, other_affine, batch_statistics[1]) if projection else None
            branches = BnBranch(x, affine, batch_statistics[0]), shortcut
            sums = ops.bn_add_relu_backward_(Gated(grad, gate), *branches, backend="cuda")
            assert torch.equal(grad, tensors[0])
            assert not torch.equal(x, tensors[1]) and torch.equal(other, tensors[2]) != projection
        results.append((grad, x, other, sums[: 2 + projection]))
    for result in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(result, results[0], strict=True))


@pytest.mark.parametrize("launches", ["SEPARATE", "FUSED"])
def test_cuda_in_either_way_is_the_oracle(monkeypatch, launches):
    place = device("cuda")
    cuda = pytest.importorskip("fusedres.kernels.bn_add_relu_backward.cuda")
    monkeypatch.setattr(cuda, "launches", getattr(cuda, launches))
    grad, x, other, active = (tensor.to(place) for tensor in _inputs((3, 40, 11, 9), torch.float32))
    affine, other_affine = state(40, torch.float32).to(place), state(40, torch.float32, seed=9).to(place)
    branches = BnBranch(x, affine, True), BnBranch(other, other_affine, True)
    got = ops.bn_add_relu_backward(Gated(grad, pack_bits(active)), *branches, backend="cuda")
    d = grad.double() * active
    for result, raw, branch in ((got[0], x, affine), (got[1], other, other_affine)):
        want, terms, _, _ = _branch(d, raw, branch, True)
        assert_near("gradient", result, want, terms, torch.float32, 16)
    assert_near("sum d", got[2][0], d.sum((0, 2, 3)), d.abs().sum((0, 2, 3)), torch.float32, 16)


def test_same_bits_on_any_number_of_threads():
    grad, x, other, active = _inputs((8, 65, 28, 28), torch.float32)
    affine, bits = state(65, torch.float32), pack_bits(active)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            ops.bn_add_relu_backward(
                Gated(grad, bits), BnBranch(x, affine, True), BnBranch(other, affine, False), backend="cpu"
            )
        )
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_errors():
    grad, x, other, active = _inputs((2, 8, 3, 3), torch.float32)
    affine = state(8, torch.float32)
    with pytest.raises(ValueError, match="bn_add_relu_backward: gate must have shape"):
        ops.bn_add_relu_backward(Gated(grad, pack_bits(active)[:1]), BnBranch(x, affine, True), None, backend="cpu")
    with pytest.raises(ValueError, match="shortcut_state must be given with shortcut,"):
        ops.bn_add_relu_backward(
            Gated(grad, None), BnBranch(x, affine, True), BnBranch(other, None, False), backend="cpu"
        )
    with pytest.raises(ValueError, match="bn_relu_backward_: x must have shape"):
        ops.bn_relu_backward_(grad, BnBranch(x[:1], affine, True), True, backend="cpu")
