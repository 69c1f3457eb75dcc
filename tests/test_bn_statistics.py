"""bn_statistics and bn_frozen against float64, and what others got wrong in them."""

from __future__ import annotations

import pytest
import torch
from op_inputs import BACKENDS, DTYPES, SHAPES, activation, assert_near, vector

from fusedres import ops


def _want(x, weight, bias, eps):
    """mean, invstd, scale, shift in float64."""
    wide = x.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    invstd = (var + eps).rsqrt()
    scale = invstd * (1 if weight is None else weight.double())
    return torch.stack((mean, invstd, scale, (0 if bias is None else bias.double()) - scale * mean)), var


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_state_and_running_statistics(backend, dtype, shape, affine):
    x = activation(shape, dtype)
    c = shape[1]
    weight, bias = (vector(c, seed=1), vector(c, seed=2)) if affine else (None, None)
    running_mean, running_var = vector(c, seed=3), vector(c, seed=4).abs()
    old_mean, old_var = running_mean.double(), running_var.double()
    batches = torch.tensor(4)
    got = ops.bn_statistics(x, weight, bias, running_mean, running_var, batches, 0.1, 1e-5, backend)
    want, var = _want(x, weight, bias, 1e-5)
    count = x.numel() // c
    terms = want.abs() + want[1] * (x.double().abs().amax((0, 2, 3)) + 1) * (want[2].abs() + 1)
    assert_near("state", got, want, terms, dtype, roundings=32)
    assert int(batches) == 5
    assert_near(
        "running_mean", running_mean, 0.9 * old_mean + 0.1 * want[0], old_mean.abs() + terms[0], torch.float32, 8
    )
    unbiased = var * count / (count - 1)
    assert_near("running_var", running_var, 0.9 * old_var + 0.1 * unbiased, old_var + unbiased + var, torch.float32, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mean", "std"), [(1e4, 0.1), (-3e3, 1.0), (0.0, 1e-3)])
@pytest.mark.parametrize("shape", [(4, 7, 20, 20), (2, 64, 33, 31)])
def test_a_mean_far_from_zero_does_not_cancel(backend, mean, std, shape):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).float()
    x = x.contiguous(memory_format=torch.channels_last)
    got = ops.bn_statistics(x, None, None, None, None, None, 0.1, 0.0, backend)
    want, _ = _want(x, None, None, 0.0)
    assert ((got[1].double() / want[1] - 1).abs() < 2e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_channel(backend):
    x = torch.full((3, 5, 40, 40), 0.1).contiguous(memory_format=torch.channels_last)
    got = ops.bn_statistics(x, None, None, None, None, None, 0.1, 1e-5, backend)
    assert ((got[1].double() - 1e-5**-0.5).abs() < 1e-4 * 1e-5**-0.5).all()


@pytest.mark.parametrize("position", [0, 1, 511, 512, 1599])
def test_an_outlier_that_is_a_chunks_first_row(position):
    x = torch.zeros(1, 1, 1600, 1)
    x[0, 0, position, 0] = 1e4
    x = x.contiguous(memory_format=torch.channels_last)
    got = ops.bn_statistics(x, None, None, None, None, None, 0.1, 0.0, "cpu")
    want, _ = _want(x, None, None, 0.0)
    assert ((got[1].double() / want[1] - 1).abs() < 5e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bessel_factor_beyond_half_precision(backend):
    x = activation((1, 2, 300, 300), torch.float16)
    running_mean, running_var = torch.zeros(2, dtype=torch.float16), torch.ones(2, dtype=torch.float16)
    ops.bn_statistics(x, None, None, running_mean, running_var, None, 1.0, 1e-5, backend)
    assert torch.allclose(running_var.double(), x.double().var((0, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cumulative_average(backend):
    running_mean, running_var, batches = torch.zeros(8), torch.zeros(8), torch.tensor(0)
    parts = [activation((2, 8, 5, 5), torch.float32, seed) for seed in range(3)]
    for x in parts:
        ops.bn_statistics(x, None, None, running_mean, running_var, batches, None, 1e-5, backend)
    assert int(batches) == 3
    assert torch.allclose(running_mean, torch.stack([x.mean((0, 2, 3)) for x in parts]).mean(0), atol=1e-6)
    assert torch.allclose(running_var, torch.stack([x.var((0, 2, 3)) for x in parts]).mean(0), rtol=1e-5)


@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (3, 65, 17, 5)])
def test_same_bits_on_any_number_of_threads(shape):
    x = activation(shape, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.bn_statistics(x, None, None, None, None, None, 0.1, 1e-5, "cpu"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen(backend, dtype):
    weight, bias, mean, var = (vector(19, seed=seed) for seed in range(4))
    var = var.abs()
    got = ops.bn_frozen(torch.empty(0, dtype=dtype), weight, bias, mean, var, 1e-3, backend)
    invstd = (var.double() + 1e-3).rsqrt()
    scale = weight.double() * invstd
    want = torch.stack((mean.double(), invstd, scale, bias.double() - scale * mean.double()))
    assert_near("state", got, want, want.abs() + (scale * mean.double()).abs(), dtype, 8)


def test_errors_leave_the_running_statistics():
    x = activation((1, 4, 1, 1), torch.float32)
    running_mean, running_var, batches = torch.zeros(4), torch.ones(4), torch.tensor(0)
    running = (running_mean, running_var, batches)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        ops.bn_statistics(x, None, None, *running, 0.1, 1e-5, "cpu")
    x = activation((2, 4, 3, 3), torch.float32)
    cases = [
        (ValueError, "bn_statistics: weight must have shape", (x, torch.ones(5), None)),
        (TypeError, "bn_statistics: weight must be float32", (x, torch.ones(4, dtype=torch.int32), None)),
        (ValueError, "bn_statistics: x must be dense and channels_last", (x.contiguous(), None, None)),
        (ValueError, "bn_statistics: x must have 4 dimensions", (x[0], None, None)),
        (TypeError, "bn_statistics: x must be float32", (x.int(), None, None)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            ops.bn_statistics(*arguments, *running, 0.1, 1e-5, "cpu")
    assert not running_mean.any() and bool((running_var == 1).all()) and int(batches) == 0
    with pytest.raises(RuntimeError, match="there is no nonsense backend"):
        ops.bn_statistics(x, None, None, None, None, None, 0.1, 1e-5, "nonsense")
