"""conv_weights converts any layout and dtype to dense channels_last, bitwise equal to torch's conversion."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, device

from fusedres import ops

BACKENDS = ("reference", "triton")


def _weight(shape, dtype, layout, seed, place):
    generator = torch.Generator().manual_seed(seed)
    k, c, r, s = shape

    def dense(*sizes):
        return torch.randn(sizes, generator=generator).to(place, dtype)

    if layout == "channels_last":
        return dense(k, r, s, c).permute(0, 3, 1, 2)
    if layout == "transposed":
        return dense(c, k, s, r).transpose(0, 1).transpose(2, 3)
    if layout == "sliced":
        return dense(2 * k, c + 1, r, 3 * s)[::2, 1:, :, ::3]
    if layout == "expanded":
        return dense(k, 1, r, s).expand(shape)
    return dense(*shape)


def _expect(got, weights, dtype):
    assert len(got) == len(weights)
    for i, (result, weight) in enumerate(zip(got, weights, strict=True)):
        assert torch.equal(result, weight.to(dtype)), f"weight {i}"
        _, c, r, s = weight.shape
        assert result.dtype == dtype and result.stride() == (c * r * s, 1, s * c, c), f"weight {i}"
        assert result.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_dtypes_and_layouts(backend, source, target):
    place = device(backend, torch.bfloat16 if torch.bfloat16 in (source, target) else source)
    shapes = [(5, 17, 3, 3), (64, 16, 1, 1), (3, 3, 7, 5), (1, 1, 1, 1)]
    layouts = ["contiguous", "channels_last", "transposed", "sliced"]
    weights = [
        _weight(shape, source, layout, seed, place)
        for seed, (shape, layout) in enumerate(zip(shapes, layouts, strict=True))
    ]
    kept = [weight.clone() for weight in weights]
    _expect(ops.conv_weights(weights, target, backend=backend), weights, target)
    assert all(torch.equal(weight, copy) for weight, copy in zip(weights, kept, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("shape", [(7, 129, 3, 3), (64, 65, 1, 1), (2, 1, 3, 3), (1, 127, 1, 3), (33, 3, 7, 7)])
def test_every_layout(backend, layout, shape):
    weight = _weight(shape, torch.float32, layout, 1, device(backend))
    _expect(ops.conv_weights([weight], torch.float16, backend=backend), [weight], torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_one_call_of_mixed_dtypes_and_sizes(backend, count):
    place = device(backend)
    weights = [
        _weight(shape, dtype, "channels_last", seed, place)
        for seed, (shape, dtype) in enumerate(
            [
                ((4, 8, 1, 1), torch.float32),
                ((32, 96, 3, 3), torch.float16),
                ((16, 4, 1, 1), torch.float64),
                ((130, 70, 1, 1), torch.float32),
            ][:count]
        )
    ]
    _expect(ops.conv_weights(weights, torch.float32, backend=backend), weights, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fresh_even_where_nothing_changes_and_nan_kept(backend):
    place = device(backend)
    weight = _weight((8, 16, 3, 3), torch.float32, "channels_last", 0, place)
    weight[1, 2, 0, 0], weight[2, 3, 1, 1] = torch.nan, -torch.inf
    (got,) = ops.conv_weights([weight], torch.float32, backend=backend)
    assert got.data_ptr() != weight.data_ptr()
    assert torch.equal(got.nan_to_num(7.0), weight.nan_to_num(7.0)) and got[1, 2, 0, 0].isnan()
    got.zero_()
    assert weight.nan_to_num(1.0).any()


def test_meta_tensors_have_the_results_layout():
    weights = [torch.empty(8, 16, 3, 3, device="meta"), torch.empty(4, 8, 1, 1, device="meta")]
    for backend in BACKENDS:
        got = ops.conv_weights(weights, torch.bfloat16, backend=backend)
        assert [tuple(out.shape) for out in got] == [(8, 16, 3, 3), (4, 8, 1, 1)]
        assert all(out.dtype == torch.bfloat16 and out.is_contiguous(memory_format=torch.channels_last) for out in got)


def test_errors():
    weight = torch.zeros(4, 8, 3, 3)
    cases = [
        (ValueError, "conv_weights: weights must be 1 to 4 tensors, got 0", [], torch.float32),
        (ValueError, "conv_weights: weights must be 1 to 4 tensors, got 5", [weight] * 5, torch.float32),
        (ValueError, r"weights\[1\] must have 4 dimensions \(K, C, R, S\)", [weight, weight[0]], torch.half),
        (TypeError, r"weights\[0\] must be float32", [weight.int()], torch.float32),
        (TypeError, "dtype must be float32, float64, bfloat16 or float16, got torch.int32", [weight], torch.int32),
    ]
    for error, message, weights, dtype in cases:
        with pytest.raises(error, match=message):
            ops.conv_weights(weights, dtype, backend="reference")
