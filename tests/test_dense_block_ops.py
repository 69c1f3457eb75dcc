"""The passes over the buffer of a dense block, against float64."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, EPS, activation, assert_near, backends_of, channels, device, state
from torch import Tensor

from fusedres import ops
from fusedres.values import BnBranch, Norm

BACKENDS = backends_of("dense_append_", "dense_bn_relu", "dense_bn_relu_backward_", "dense_gradient")
# (N, D, H, W), and the channels of a prefix: rows off the vector width, one channel, one pixel, and many rows
CASES = (((2, 75, 5, 3), 33), ((3, 3, 4, 4), 1), ((4, 130, 1, 1), 129), ((5, 64, 14, 13), 48), ((1, 16, 3, 2), 16))
PORTABLE = ("cpu", "reference")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "c"), CASES)
def test_append(backend, dtype, shape, c):
    where = device(backend, dtype)
    buffer = activation(shape, dtype).to(where)
    n, width, h, w = shape
    x = (activation((n, c, h, w), dtype, 1) + 100).to(where)
    first = width - c
    moments = torch.full((width, 2), 7.0, dtype=torch.float64, device=where)
    before = buffer.clone()
    ops.dense_append_(buffer, x, first, moments, backend=backend)
    assert torch.equal(buffer[:, :first], before[:, :first]) and torch.equal(buffer[:, first:], x)
    assert bool((moments[:first] == 7).all())
    wide, rows = x.double(), n * h * w
    mean = wide.mean((0, 2, 3))
    m2 = (wide - channels(mean)).square().sum((0, 2, 3))
    eps = EPS[_wide(dtype)]
    assert bool(((moments[first:, 0] - mean).abs() <= 4 * eps * (mean.abs() + m2.sqrt())).all())
    deviation = (wide - channels(mean)).abs().amax((0, 2, 3))
    assert bool(((moments[first:, 1] - m2).abs() <= 64 * eps * rows * deviation.square() + 1e-30).all())
    ops.dense_append_(before, x, first, None, backend=backend)
    assert torch.equal(before, buffer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cumulative", [False, True])
def test_state_from_moments(backend, dtype, cumulative):
    where = device(backend)
    x = activation((4, 37, 6, 5), dtype).to(where)
    moments = torch.empty((37, 2), dtype=torch.float64, device=where)
    ops.dense_append_(torch.empty_like(x), x, 0, moments, backend="reference")
    vectors = [torch.rand(37, generator=torch.Generator().manual_seed(i)).to(where) + 0.5 for i in range(4)]
    norms = [
        Norm(*(v.clone() for v in vectors), torch.tensor(3, device=where), None if cumulative else 0.3, 1e-5)
        for _ in range(2)
    ]
    got = ops.bn_from_moments(moments, 120, norms[0], dtype, backend=backend)
    want = ops.bn_statistics(x, norms[1], backend="reference")
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for a, b in zip(norms[0][2:5], norms[1][2:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "c"), CASES)
def test_apply(backend, dtype, shape, c):
    where = device(backend, dtype)
    buffer, affine = activation(shape, dtype).to(where), state(c, dtype).to(where)
    buffer[0, 0, 0, 0] = torch.nan
    got = ops.dense_bn_relu(buffer, affine, backend=backend)
    x = buffer[:, :c].double()
    want = (x * channels(affine[2]) + channels(affine[3])).relu()
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == dtype
    assert_near("h", got, want, x.abs() * channels(affine[2]).abs() + channels(affine[3]).abs(), dtype)


def _layer(x: Tensor, affine: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return d and the normalised x, in float64, with the gate as the kernels compute it."""
    gate = x.to(affine.dtype).double() * channels(affine[2]) + channels(affine[3])
    return grad.double().masked_fill(gate <= 0, 0), (x.double() - channels(affine[0])) * channels(affine[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "c"), CASES)
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_backward(backend, dtype, shape, c, batch_statistics):
    where = device(backend, dtype)
    n, width, h, w = shape
    buffer, affine = activation(shape, dtype).to(where), state(c, dtype).to(where)
    grad, grad_x = activation((n, c, h, w), dtype, 2).to(where), activation(shape, dtype, 3).to(where)
    corrections = torch.ones((width, 2), dtype=torch.float64, device=where)
    before = grad_x.clone()
    branch = BnBranch(buffer, affine, batch_statistics)
    sums = ops.dense_bn_relu_backward_(grad, branch, grad_x, corrections, backend=backend)
    d, normalised = _layer(buffer[:, :c], affine, grad)
    scale, invstd = affine[2].double(), affine[1].double()
    assert torch.equal(grad_x[:, c:], before[:, c:])
    want = before[:, :c].double() + channels(scale) * d
    terms = before[:, :c].double().abs() + (channels(scale) * d).abs()
    assert_near("grad_x", grad_x[:, :c], want, terms, dtype)
    for got, term in ((sums[0], d), (sums[1], d * normalised)):
        assert_near("sums", got, term.sum((0, 2, 3)), term.abs().sum((0, 2, 3)) + 1e-30, _wide(dtype))
    total = torch.stack((scale * d.sum((0, 2, 3)), scale * invstd * (d * normalised).sum((0, 2, 3))), 1)
    added = total / (n * h * w) if batch_statistics else torch.zeros_like(total)
    assert bool((corrections[c:] == 1).all())
    torch.testing.assert_close(corrections[:c], 1 + added, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "c"), CASES)
def test_gradient(backend, dtype, shape, c):
    where = device(backend, dtype)
    width, first = shape[1], shape[1] - c
    buffer, grad_x = activation(shape, dtype).to(where), activation(shape, dtype, 3).to(where)
    generator = torch.Generator().manual_seed(0)
    moments, corrections = (torch.randn((width, 2), generator=generator, dtype=torch.float64).to(where) for _ in "ab")
    got = ops.dense_gradient(buffer, grad_x, moments, corrections, first, c, backend=backend)
    x, grad = buffer[:, first:].double(), grad_x[:, first:].double()
    offset, slope, mean = (channels(v[first:]) for v in (corrections[:, 0], corrections[:, 1], moments[:, 0]))
    terms = grad.abs() + offset.abs() + (x.abs() + mean.abs()) * slope.abs()
    assert_near("grad", got, grad - offset - (x - mean) * slope, terms, dtype)
    plain = ops.dense_gradient(buffer, grad_x, None, None, first, c, backend=backend)
    assert torch.equal(plain, grad_x[:, first:]) and plain.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend):
    where = device(backend)
    buffer = activation((0, 9, 3, 3), torch.float32).to(where)
    grad, affine = buffer[:, :4].contiguous(memory_format=torch.channels_last), state(4, torch.float32).to(where)
    corrections = torch.zeros((9, 2), dtype=torch.float64, device=where)
    ops.dense_append_(buffer, grad, 2, corrections.clone(), backend=backend)
    sums = ops.dense_bn_relu_backward_(
        grad, BnBranch(buffer, affine, True), buffer.clone(), corrections, backend=backend
    )
    assert bool((sums == 0).all()) and bool((corrections == 0).all())
    assert ops.dense_gradient(buffer, buffer.clone(), None, None, 1, 3, backend=backend).shape == (0, 3, 3, 3)
    if backend in PORTABLE:
        assert ops.dense_bn_relu(buffer, affine, backend=backend).shape == (0, 4, 3, 3)


def test_errors():
    x, buffer = activation((2, 4, 3, 3), torch.float32), activation((2, 9, 3, 3), torch.float32)
    with pytest.raises(ValueError, match="dense_append_: first must leave room for 4 of 9 channels, got 6"):
        ops.dense_append_(buffer, x, 6, None, backend="cpu")
    with pytest.raises(ValueError, match="dense_gradient: first must leave room for 5 of 9 channels, got 5"):
        ops.dense_gradient(buffer, buffer.clone(), None, None, 5, 5, backend="cpu")
    with pytest.raises(ValueError, match="dense_bn_relu: state must have shape"):
        ops.dense_bn_relu(buffer, state(10, torch.float32), backend="cpu")
    branch, corrections = BnBranch(buffer, state(4, torch.float32), True), torch.zeros(9, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="grad_x must share no memory with buffer"):
        ops.dense_bn_relu_backward_(x, branch, buffer, corrections, backend="cpu")
