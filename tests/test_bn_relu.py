"""bn_relu, forward and in place, against float64."""

from __future__ import annotations

import pytest
import torch
from op_inputs import BACKENDS, DTYPES, SHAPES, activation, assert_near, channels, device, state, vector

from fusedres import ops


def _want(x, affine, pivot, stride):
    z = x.double()[:, :, ::stride, ::stride]
    terms = z.abs()
    if affine is not None:
        terms = z.abs() * channels(affine[2]).abs() + channels(affine[3]).abs()
        z = (z * channels(affine[2]) + channels(affine[3])).relu()
    if pivot is not None:
        z, terms = z - channels(pivot), terms + channels(pivot).abs()
    return z, terms


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("with_state", "with_pivot", "stride"), [(1, 0, 1), (1, 1, 1), (0, 1, 2), (0, 0, 2), (0, 0, 3)]
)
def test_forward(backend, dtype, shape, with_state, with_pivot, stride):
    where, wide = device(backend, dtype), torch.float64 if dtype == torch.float64 else torch.float32
    x = activation(shape, dtype).to(where)
    affine = state(shape[1], dtype).to(where) if with_state else None
    pivot = vector(shape[1], wide).to(where) if with_pivot else None
    got = ops.bn_relu(x, affine, backend, pivot, stride)
    want, terms = _want(x, affine, pivot, stride)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert_near("z", got, want, terms, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits(backend, dtype):
    where = device(backend, dtype)
    x = activation((3, 37, 5, 6), dtype).to(where)
    affine = state(37, dtype).to(where)
    want = ops.bn_relu(x, affine, backend)
    ops.bn_relu_(x, affine, backend)
    assert torch.equal(x, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_pass_as_in_torch(backend, dtype):
    where = device(backend, dtype)
    x = activation((2, 33, 3, 3), dtype).to(where)
    x[0, :, 0, 0], x[1, :, 1, 1], x[1, :, 2, 2] = torch.nan, torch.inf, -torch.inf
    affine = state(33, dtype).to(where)
    want = (x.double() * channels(affine[2]) + channels(affine[3])).relu()
    got = ops.bn_relu(x, affine, backend)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    assert int(got.isnan().sum()) == 33


def test_every_bfloat16_and_float16_value_survives():
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 64, 32, 32)
        x = x.contiguous(memory_format=torch.channels_last)
        got = ops.bn_relu(x, None, "cpu")
        assert torch.equal(got.isnan(), x.isnan())
        assert torch.equal(got[~x.isnan()], x[~x.isnan()])


def test_errors():
    x = activation((2, 4, 3, 3), torch.float32)
    with pytest.raises(ValueError, match="bn_relu: state must have shape"):
        ops.bn_relu(x, torch.ones(4, 5), "cpu")
    with pytest.raises(TypeError, match=r"bn_relu: state must be torch\.float32"):
        ops.bn_relu(x, torch.ones(4, 4, dtype=torch.float64), "cpu")
    with pytest.raises(ValueError, match="bn_relu: stride must be at least 1"):
        ops.bn_relu(x, None, "cpu", stride=0)
