"""bn_statistics, bn_finalize and bn_frozen against float64, and errors that other implementations made in them."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, SHAPES, activation, assert_near, backends_of, device, vector

from fusedres import ops
from fusedres.values import Norm


def _want(x, weight, bias, eps):
    """Return mean, invstd, scale and shift in float64."""
    wide = x.double()
    mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
    invstd = (var + eps).rsqrt()
    scale = invstd * (1 if weight is None else weight.double())
    return torch.stack((mean, invstd, scale, (0 if bias is None else bias.double()) - scale * mean)), var


@pytest.mark.parametrize("backend", backends_of("bn_statistics"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_state_and_running_statistics(backend, dtype, shape, affine):
    where = device(backend, dtype)
    x = activation(shape, dtype).to(where)
    c = shape[1]
    weight, bias = (vector(c, seed=1).to(where), vector(c, seed=2).to(where)) if affine else (None, None)
    running_mean, running_var = vector(c, seed=3).to(where), vector(c, seed=4).abs().to(where)
    old_mean, old_var = running_mean.double(), running_var.double()
    batches = torch.tensor(4, device=where)
    got = ops.bn_statistics(x, Norm(weight, bias, running_mean, running_var, batches, 0.1, 1e-5), backend=backend)
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


@pytest.mark.parametrize("backend", backends_of("bn_statistics_of_sum_"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_of_a_sum(backend, dtype, shape):
    """The sum is torch's, bit by bit, and its statistics are those that bn_statistics finds in it."""
    where = device(backend, dtype)
    x, added = activation(shape, dtype).to(where), activation(shape, dtype, 1).to(where)
    want = x + added
    norms = [Norm(None, None, *(vector(shape[1], seed=3).abs().to(where) for _ in range(2)), None, 0.1, 1e-5)
             for _ in range(2)]  # fmt: skip
    got = ops.bn_statistics_of_sum_(x, added, norms[0], backend=backend)
    assert torch.equal(x, want)
    assert torch.equal(got, ops.bn_statistics(want, norms[1], backend=backend))
    assert all(torch.equal(a, b) for a, b in zip(norms[0][2:4], norms[1][2:4], strict=True))


@pytest.mark.parametrize("backend", backends_of("bn_statistics_and_means"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 24, 40, 41), (2, 64, 56, 56)])
def test_statistics_and_the_means_of_each_sample(backend, dtype, shape):
    where = device(backend, dtype)
    x = activation(shape, dtype).to(where) + torch.arange(shape[0], dtype=dtype, device=where).view(-1, 1, 1, 1)
    x[-1, 0, -1, -1], x[0, -1, 0, 0] = torch.inf, 2**15
    norms = [Norm(None, None, *(vector(shape[1], seed=3).abs().to(where) for _ in range(2)), None, 0.1, 1e-5)
             for _ in range(2)]  # fmt: skip
    state, means = ops.bn_statistics_and_means(x, norms[0], backend=backend)
    terms = x.double().abs().amax((0, 2, 3)).expand(x.shape[:2])  # of all samples: they share a pivot
    assert_near("means", means, x.double().mean((2, 3)), terms, dtype, roundings=32)
    only = ops.bn_statistics(x, norms[1], backend=backend)
    for ours, other in ((state, only), *zip(norms[0][2:4], norms[1][2:4], strict=True)):
        assert_near("state", ours, other.double(), other.double().abs() + terms[0], torch.float32, roundings=32)


@pytest.mark.parametrize("backend", backends_of("bn_statistics"))
@pytest.mark.parametrize(("mean", "std"), [(1e4, 0.1), (-3e3, 1.0), (0.0, 1e-3)])
@pytest.mark.parametrize("shape", [(4, 7, 20, 20), (2, 64, 33, 31)])
def test_a_mean_far_from_zero_does_not_cancel(backend, mean, std, shape):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * std + mean).float()
    x = x.contiguous(memory_format=torch.channels_last).to(device(backend))
    got = ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 0.0), backend=backend)
    want, _ = _want(x, None, None, 0.0)
    assert ((got[1].double() / want[1] - 1).abs() < 2e-5).all()


@pytest.mark.parametrize("backend", backends_of("bn_statistics"))
def test_constant_channel(backend):
    x = torch.full((3, 5, 40, 40), 0.1).contiguous(memory_format=torch.channels_last).to(device(backend))
    got = ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5), backend=backend)
    assert ((got[1].double() - 1e-5**-0.5).abs() < 1e-4 * 1e-5**-0.5).all()


@pytest.mark.parametrize("backend", backends_of("bn_statistics"))
@pytest.mark.parametrize("position", [0, 1, 511, 512, 1599])
def test_an_outlier_that_is_a_chunks_first_row(backend, position):
    x = torch.zeros(1, 1, 1600, 1)
    x[0, 0, position, 0] = 1e4
    x = x.contiguous(memory_format=torch.channels_last).to(device(backend))
    got = ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 0.0), backend=backend)
    want, _ = _want(x, None, None, 0.0)
    assert ((got[1].double() / want[1] - 1).abs() < 5e-5).all()


@pytest.mark.parametrize("backend", backends_of("bn_statistics"))
def test_bessel_factor_beyond_half_precision(backend):
    x = activation((1, 2, 256, 257), torch.float16).to(device(backend))
    running_mean, running_var = x.new_zeros(2), x.new_ones(2)
    ops.bn_statistics(x, Norm(None, None, running_mean, running_var, None, 1.0, 1e-5), backend=backend)
    assert torch.allclose(running_var.double(), x.double().var((0, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("backend", backends_of("bn_statistics"))
def test_cumulative_average(backend):
    where = device(backend)
    running_mean, running_var = torch.zeros(8, device=where), torch.zeros(8, device=where)
    batches = torch.tensor(0, device=where)
    parts = [activation((2, 8, 5, 5), torch.float32, seed).to(where) for seed in range(3)]
    for x in parts:
        ops.bn_statistics(x, Norm(None, None, running_mean, running_var, batches, None, 1e-5), backend=backend)
    assert int(batches) == 3
    assert torch.allclose(running_mean, torch.stack([x.mean((0, 2, 3)) for x in parts]).mean(0), atol=1e-6)
    assert torch.allclose(running_var, torch.stack([x.var((0, 2, 3)) for x in parts]).mean(0), rtol=1e-5)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("shape", [(4, 64, 14, 14), (3, 65, 17, 5)])
def test_same_bits_every_time(backend, shape):
    x = activation(shape, torch.float32).to(device(backend))
    once, *more = (
        ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5), backend=backend)
        for _ in range(100 if x.is_cuda else 3)
    )
    assert all(torch.equal(once, again) for again in more)


@pytest.mark.parametrize("shape", [(8, 64, 28, 28), (3, 65, 17, 5)])
def test_same_bits_on_any_number_of_threads(shape):
    x = activation(shape, torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5), backend="cpu"))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("backend", backends_of("bn_frozen"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen(backend, dtype):
    where = device(backend, dtype)
    weight, bias, mean, var = (vector(19, seed=seed).to(where) for seed in range(4))
    var = var.abs()
    got = ops.bn_frozen(
        torch.empty(0, dtype=dtype, device=where), Norm(weight, bias, mean, var, None, 0.1, 1e-3), backend=backend
    )
    invstd = (var.double() + 1e-3).rsqrt()
    scale = weight.double() * invstd
    want = torch.stack((mean.double(), invstd, scale, bias.double() - scale * mean.double()))
    assert_near("state", got, want, want.abs() + (scale * mean.double()).abs(), dtype, 8)


def test_errors_leave_the_running_statistics():
    x = activation((1, 4, 1, 1), torch.float32)
    running_mean, running_var, batches = torch.zeros(4), torch.ones(4), torch.tensor(0)
    running = (running_mean, running_var, batches)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        ops.bn_statistics(x, Norm(None, None, *running, 0.1, 1e-5), backend="cpu")
    x = activation((2, 4, 3, 3), torch.float32)
    cases = [
        (ValueError, "bn_statistics: weight must have shape", (x, torch.ones(5), None)),
        (TypeError, "bn_statistics: weight must be float32", (x, torch.ones(4, dtype=torch.int32), None)),
        (ValueError, "bn_statistics: x must be dense and channels_last", (x.contiguous(), None, None)),
        (ValueError, "bn_statistics: x must have 4 dimensions", (x[0], None, None)),
        (TypeError, "bn_statistics: x must be float32", (x.int(), None, None)),
    ]
    for error, message, (wrong, weight, bias) in cases:
        with pytest.raises(error, match=message):
            ops.bn_statistics(wrong, Norm(weight, bias, *running, 0.1, 1e-5), backend="cpu")
    assert not running_mean.any() and bool((running_var == 1).all()) and int(batches) == 0
    with pytest.raises(RuntimeError, match="there is no nonsense backend"):
        ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5), backend="nonsense")


def _partials(x, tiles, dtype=torch.float32):
    """Split x into this many uneven row tiles; return mean and M2 of each tile, and its number of rows."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    cuts = sorted(torch.randperm(len(rows) - 1)[: tiles - 1].add(1).tolist())
    parts = [part.double() for part in rows.tensor_split(cuts)]
    statistics = torch.stack([torch.stack((part.mean(0), part.var(0, correction=0) * len(part))) for part in parts])
    return statistics.to(dtype), torch.tensor([len(part) for part in parts], dtype=dtype, device=x.device)


@pytest.mark.parametrize("backend", backends_of("bn_finalize"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("tiles", "c"), [(1, 65), (2, 1), (13, 130), (700, 3)])
@pytest.mark.parametrize("running_dtype", [torch.float32, torch.float16])
def test_finalize(backend, dtype, tiles, c, running_dtype):
    where = device(backend, dtype)
    x = activation((4, c, 19, 17), torch.float64).to(where)
    partials, rows = _partials(x, tiles, dtype)
    weight, bias = vector(c, seed=1).to(where), vector(c, torch.float16, seed=2).to(where)
    running_mean = vector(c, running_dtype, seed=3).to(where)
    running_var = vector(c, running_dtype, seed=4).abs().to(where)
    old_mean, old_var, batches = running_mean.double(), running_var.double(), torch.tensor(7, device=where)
    running = (running_mean, running_var, batches)
    got = ops.bn_finalize(partials, rows, Norm(weight, bias, *running, 0.1, 1e-3), backend=backend)
    want, var = _want(x, weight, bias, 1e-3)
    terms = want.abs() + want[1] * (x.abs().amax((0, 2, 3)) + 1) * (want[2].abs() + 1)
    assert got.dtype == dtype and int(batches) == 8
    assert_near("state", got, want, terms, dtype, roundings=16)
    mean_terms, unbiased = old_mean.abs() + terms[0], var * len(x) * 323 / (len(x) * 323 - 1)
    assert_near("running_mean", running_mean, 0.9 * old_mean + 0.1 * want[0], mean_terms, dtype, 8)
    assert_near("running_var", running_var, 0.9 * old_var + 0.1 * unbiased, old_var + 2 * unbiased, dtype, 16)


@pytest.mark.parametrize("backend", backends_of("bn_finalize"))
@pytest.mark.parametrize("tiles", [1, 5, 700])
def test_finalize_does_not_cancel(backend, tiles):
    """The reference are the same partial statistics in float64; a third of the channels is constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((3, 9, 30, 31), generator=generator, dtype=torch.float64) * 0.1 + 1e4
    x[:, ::3] = 1e4
    partials, rows = _partials(x.to(device(backend)), tiles)
    got = ops.bn_finalize(partials, rows, Norm(None, None, None, None, None, 0.1, 1e-5), backend=backend)
    mean, m2 = partials.double().unbind(1)
    weights, count = rows.double().unsqueeze(1), rows.double().sum()
    want = (m2 + weights * (mean - (weights * mean).sum(0) / count).square()).sum(0) / count
    assert ((got[1].double() / (want + 1e-5).rsqrt() - 1).abs() < 1e-5).all()
    assert ((got[0].double() - (weights * mean).sum(0) / count).abs() < 1e-3).all()
    assert (got[1, ::3].double() * 1e-5**0.5 - 1).abs().max() < 1e-5


@pytest.mark.parametrize("backend", backends_of("bn_finalize"))
def test_finalize_averages_cumulatively(backend):
    where = device(backend)
    running_mean, running_var = torch.zeros(200, device=where), torch.zeros(200, device=where)
    batches = torch.tensor(0, device=where)
    parts = [activation((2, 200, 5, 5), torch.float32, seed).to(where) for seed in range(3)]
    for x in parts:
        norm = Norm(None, None, running_mean, running_var, batches, None, 1e-5)
        ops.bn_finalize(*_partials(x, 4), norm, backend=backend)
    assert int(batches) == 3
    assert torch.allclose(running_mean, torch.stack([x.mean((0, 2, 3)) for x in parts]).mean(0), atol=1e-6)
    assert torch.allclose(running_var, torch.stack([x.var((0, 2, 3)) for x in parts]).mean(0), rtol=1e-5)


@pytest.mark.parametrize("backend", backends_of("bn_statistics"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_infinity_and_nan_stay_in_their_channel(backend, dtype):
    """The mean of infinities of one sign is that infinity, wherever they are; the variance is NaN."""
    x = activation((2, 6, 30, 30), dtype).to(device(backend, dtype))
    x[0, 0, 0, 0], x[1, 1, 7, 7], x[0, 2, 0, 0], x[1, 3, 29, 29] = torch.inf, torch.inf, torch.nan, torch.nan
    got = ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5), backend=backend)
    assert (got[0, :2] == torch.inf).all() and got[0, 2:4].isnan().all() and got[1, :4].isnan().all()
    assert got[:, 4:].isfinite().all()


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 1023, 1024])
def test_one_tile_of_many_blocks(rows, monkeypatch):
    """On one multiprocessor a program loops over all its rows; the last tile may not be full."""
    from fusedres.kernels.bn_statistics import triton as kernels

    monkeypatch.setattr(kernels, "multiprocessors", lambda device: 1)
    x = activation((2, 70, rows, 3), torch.float32).to(device("triton"))
    got = ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 1e-5), backend="triton")
    want, _ = _want(x, None, None, 1e-5)
    assert_near("state", got, want, want.abs() + want[1] * x.double().abs().amax((0, 2, 3)), torch.float32, 32)


def test_errors_of_finalize_leave_the_running_statistics():
    running = (torch.zeros(4), torch.ones(4), torch.tensor(0))
    partials, rows = torch.zeros(3, 2, 4), torch.ones(3)
    cases = [
        (ValueError, r"bn_finalize: partials must have shape \(T, 2, C\)", (partials[0], rows)),
        (ValueError, r"bn_finalize: partials must have shape \(T, 2, C\)", (partials[:0], rows[:0])),
        (TypeError, "bn_finalize: partials must be float32 or float64", (partials.half(), rows)),
        (ValueError, "bn_finalize: partials must be contiguous", (torch.zeros(3, 4, 2).mT, rows)),
        (ValueError, r"bn_finalize: rows must have shape \(3,\)", (partials, rows[:2])),
        (TypeError, r"bn_finalize: rows must be torch\.float32", (partials, rows.double())),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            ops.bn_finalize(*arguments, Norm(None, None, *running, 0.1, 1e-5), backend="reference")
    with pytest.raises(ValueError, match="bn_finalize: momentum must be a number where num_batches_tracked is None"):
        ops.bn_finalize(partials, rows, Norm(None, None, *running[:2], None, None, 1e-5), backend="reference")
    with pytest.raises(RuntimeError, match="bn_finalize: there is no cpu backend"):
        ops.bn_finalize(partials, rows, Norm(None, None, *running, 0.1, 1e-5), backend="cpu")
    assert not running[0].any() and bool((running[1] == 1).all()) and int(running[2]) == 0
