"""Backward of BatchNorm under a ReLU: functional and in place, one and two branches, against float64."""

from __future__ import annotations

import pytest
import torch
from op_inputs import BACKENDS, DTYPES, SHAPES, activation, assert_near, channels, state

from fusedres import ops
from fusedres.kernels.reference import pack_bits


def _branch(d, x, affine, batch_statistics):
    """grad_x, Σd·x̂, and the sums of |terms| of both, in float64."""
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


def _inputs(shape, dtype):
    grad, x, other = (activation(shape, dtype, seed) for seed in (1, 2, 3))
    active = activation(shape, torch.float32, 4) > 0
    return grad, x, other, active


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("gate_kind", "projection", "batch_statistics"),
    [("bits", False, True), ("bits", True, True), ("output", False, False), (None, True, False)],
)
def test_tail(backend, dtype, shape, gate_kind, projection, batch_statistics):
    grad, x, other, active = _inputs(shape, dtype)
    affine, other_affine = state(shape[1], dtype), state(shape[1], dtype, seed=9)
    gate = {"bits": pack_bits(active), "output": active.to(dtype).contiguous(memory_format=torch.channels_last)}.get(
        gate_kind or ""
    )
    d = grad.double() * active if gate is not None else grad.double()
    kept = grad.clone()
    options = {"batch_statistics": batch_statistics}
    if projection:
        options |= {"shortcut_x": other, "shortcut_state": other_affine, "shortcut_batch_statistics": True}
    grad_x, grad_other, sums = ops.bn_add_relu_backward(grad, gate, x, affine, backend, **options)
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
    in_place = ops.bn_add_relu_backward_(grad, gate, x, affine, backend, **options)
    assert torch.equal(x, grad_x) and torch.equal(in_place[:2], sums[:2])
    if projection:
        assert torch.equal(other, grad_other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [True, False])
def test_inner(backend, dtype, shape, gated):
    grad, x, _, _ = _inputs(shape, dtype)
    affine = state(shape[1], dtype)
    z = x.double() * channels(affine[2]) + channels(affine[3])
    d = torch.where(z <= 0, 0.0, grad.double()) if gated else grad.double()
    clear = z.abs() > 1e-5 if dtype != torch.float64 else z.abs() > 1e-13
    assert clear.all()
    want, terms, product, product_terms = _branch(d, x, affine, True)
    sums = ops.bn_relu_backward_(grad, x, affine, backend, gated=gated, batch_statistics=True)
    assert_near("grad", grad, want, terms, dtype, 16)
    mean_terms = d.abs().sum((0, 2, 3)) * (affine[0] * affine[1]).double().abs()
    assert_near("sum d·x̂", sums[1], product, product_terms + mean_terms, dtype, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_gate_lets_the_gradient_pass(backend):
    grad, x, _, _ = _inputs((1, 18, 2, 2), torch.float32)
    output = torch.zeros_like(x)
    output[0, 17, 1, 0] = torch.nan
    _, _, sums = ops.bn_add_relu_backward(grad, output, x, state(18, torch.float32), backend, batch_statistics=False)
    assert sums[0, 17] == grad[0, 17, 1, 0] and not sums[0, :17].any()


def test_same_bits_on_any_number_of_threads():
    grad, x, other, active = _inputs((8, 65, 28, 28), torch.float32)
    affine, bits = state(65, torch.float32), pack_bits(active)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            ops.bn_add_relu_backward(
                grad, bits, x, affine, "cpu", batch_statistics=True, shortcut_x=other, shortcut_state=affine
            )
        )
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_errors():
    grad, x, other, active = _inputs((2, 8, 3, 3), torch.float32)
    affine = state(8, torch.float32)
    with pytest.raises(ValueError, match="bn_add_relu_backward: gate must have shape"):
        ops.bn_add_relu_backward(grad, pack_bits(active)[:1], x, affine, "cpu", batch_statistics=True)
    with pytest.raises(ValueError, match="shortcut_state must be given with shortcut_x"):
        ops.bn_add_relu_backward(grad, None, x, affine, "cpu", batch_statistics=True, shortcut_x=other)
    with pytest.raises(ValueError, match="bn_relu_backward_: x must have shape"):
        ops.bn_relu_backward_(grad, x[:1], affine, "cpu", gated=True, batch_statistics=True)
