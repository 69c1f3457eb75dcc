"""Each small product of a one-pass unit against float64: statistics, folded weight, and those of backward."""

from __future__ import annotations

import pytest
import torch
from op_inputs import EPS, backends_of, device, state, vector

from fusedres import ops
from fusedres.values import Gram, GramState, Norm

EPSILON = 1e-5
# K, C: one value; no multiples of a tile; several tiles each way; a product that Triton computes in float32
# (FLOAT64_PRODUCTS)
SIZES = ((3, 1), (129, 65), (64, 130), (1030, 129))


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _weight(k, c, dtype, strides="dense"):
    """Return a (K, C, 1, 1) weight with another scale in each channel; if transposed, the stride of K is 1."""
    weight = (_random(k, c, 1, 1, seed=1) * (0.2 + _random(k, 1, 1, 1, seed=2).abs()) / c**0.5).to(dtype)
    if strides == "transposed":
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    return weight


def _close(name, got, want, terms, dtype, roundings):
    """Assert |got - want| <= roundings·eps·terms; terms broadcast."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    error = (got.double().cpu() - want).abs() / (EPS[dtype] * (terms + 1e-300))
    assert not error.isnan().any(), f"{name}: NaN"
    assert error.max() <= roundings, f"{name}: error of {error.max():.3g} roundings, allowed {roundings}"


def _statistics(backend, weight, pivot, total, gram, count, gamma, beta, running, momentum):
    where = device(backend)
    running = [None if r is None else r.to(where) for r in running]
    tensors = [None if t is None else t.to(where) for t in (weight, pivot, total, gram)]
    norm = [None if t is None else t.to(where) for t in (gamma, beta)]
    weight, *sums = tensors
    norm = Norm(*norm, *running, momentum, EPSILON)
    got = ops.one_pass_statistics(weight, Gram(*sums), count, norm, backend=backend)
    return *(t.cpu() for t in got), [None if r is None else r.cpu() for r in running]


@pytest.mark.parametrize("backend", backends_of("one_pass_statistics"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("mean", "std", "weight_dtype", "strides", "momentum", "batches"),
    [
        (0.0, 1.0, torch.float32, "dense", 0.1, 4),
        (1e4, 0.1, torch.float32, "transposed", None, 2),
        (-30.0, 1.0, torch.float16, "dense", 1.0, None),
        (2.0, 3.0, torch.float64, "transposed", None, 0),
    ],
)
def test_statistics(backend, dtype, size, mean, std, weight_dtype, strides, momentum, batches):
    """z' lies far from 0: the pivot does not help, so that Cov must be computed in float64."""
    (k, c), count = size, 300
    z = _random(count, c, seed=3) * std + mean
    weight = _weight(k, c, weight_dtype, strides)
    pivot = (_random(c, seed=4) + 7).to(dtype)
    gamma, beta = vector(k, torch.float32, 5), vector(k, torch.float64, 6)
    running = [vector(k, torch.float32, 7), vector(k, torch.float64, 8).abs()]
    before = [r.clone().double() for r in running]
    running.append(None if batches is None else torch.tensor(batches))
    assert (size == SIZES[-1]) is (k * c * c > 1 << 24)
    got, projected, running = _statistics(
        backend, weight, pivot, z.sum(0), z.T @ z, count, gamma, beta, running, momentum
    )

    matrix = weight.double().flatten(1)
    gap = z - z.mean(0)
    cov = gap.T @ gap / count
    y, y_gap = matrix @ z.mean(0), gap @ matrix.T
    var = y_gap.square().mean(0)
    invstd = (var + EPSILON).rsqrt()
    # float64 rounding errors in G_z itself grow by (mean / std)²
    lost = 1 + (mean / std) ** 2 * EPS[torch.float64] / EPS[dtype] * 64
    assert got.dtype == projected.dtype == dtype
    _close("mean", got[0], y, matrix.abs() @ z.mean(0).abs(), dtype, 4)
    spread = cov.diagonal().sqrt()
    _close("projected", projected, matrix @ cov, (matrix.abs() @ spread)[:, None] * spread * lost, dtype, 16)
    loss = (matrix.abs() @ spread).square() / (var + EPSILON) * lost
    _close("invstd", got[1], invstd, invstd * loss, dtype, 8)
    _close("scale", got[2], gamma.double() * invstd, gamma.double().abs() * invstd * loss, dtype, 8)
    shift = beta - gamma.double() * invstd * y
    terms = beta.abs() + (gamma.double() * invstd).abs() * (matrix.abs() @ z.mean(0).abs()) * loss
    _close("shift", got[3], shift, terms, dtype, 8)
    if batches is not None:
        assert int(running[2]) == batches + 1
    factor = 1 / (batches + 1) if momentum is None else momentum
    shifted = y + matrix @ pivot.double()
    terms = before[0].abs() + matrix.abs() @ (z.mean(0).abs() + pivot.double().abs())
    _close("running_mean", running[0], (1 - factor) * before[0] + factor * shifted, terms, torch.float32, 4)
    unbiased = (1 - factor) * before[1] + factor * var * count / (count - 1)
    _close("running_var", running[1], unbiased, before[1] + var * loss, dtype, 8)


@pytest.mark.parametrize("backend", backends_of("one_pass_statistics"))
@pytest.mark.parametrize("k", [5, 1030])
def test_a_constant_channel_has_no_variance(backend, k):
    """The variance is 0 for constant inputs and where rounding gave a negative sum; NaN stays NaN."""
    count, c = 50, 129
    z = _random(count, c, seed=3)
    z[:, :4] = 3.0
    weight = torch.zeros(k, c, 1, 1)
    weight[0, :4] = 1.0
    weight[1:, 4:] = _weight(k - 1, c - 4, torch.float32)
    nothing = [None] * 3
    total, gram = z.sum(0), z.T @ z
    got, _, _ = _statistics(backend, weight, torch.zeros(c), total, gram, count, None, None, nothing, 0.1)
    most = EPSILON**-0.5
    assert got[1, 0].item() == pytest.approx(most, rel=1e-7) and got[0, 0] == 12.0
    assert (got[1, 1:] < 100).all() and got[3, 0].item() == pytest.approx(-12.0 * most, rel=1e-6)

    total = torch.full((c,), 1e4 * count, dtype=torch.float64)
    gram = torch.outer(total, total) / count * (1 - 1e-9)
    weight[-1, -1] = torch.nan
    running = [torch.zeros(k), torch.ones(k), torch.tensor(0)]
    got, _, running = _statistics(backend, weight, torch.zeros(c), total, gram, count, None, None, running, 1.0)
    assert (got[1, :-1] == got[1, 0]).all() and got[1, 0].item() == pytest.approx(most, rel=1e-7)
    assert (running[1][:-1] == 0).all()
    assert got[1, -1].isnan() and running[1][-1].isnan()


@pytest.mark.parametrize("backend", backends_of("one_pass_statistics"))
def test_without_affine_and_running_statistics(backend):
    k, c, count = 65, 3, 40
    z = _random(count, c, seed=3)
    arguments = (_weight(k, c, torch.float32), torch.zeros(c), z.sum(0), z.T @ z, count)
    one, zero = torch.ones(k), torch.zeros(k)
    plain, _, _ = _statistics(backend, *arguments, None, None, [None] * 3, None)
    running = [torch.zeros(k), torch.ones(k), None]
    affine, _, _ = _statistics(backend, *arguments, one, zero, running, 0.1)
    assert torch.equal(plain, affine)
    counted = [None, None, torch.tensor(7)]
    assert int(_statistics(backend, *arguments, None, None, counted, None)[2][2]) == 8


@pytest.mark.parametrize("backend", backends_of("one_pass_fold"))
@pytest.mark.parametrize(("dtype", "weight_dtype"), [
    (torch.float32, torch.float32), (torch.float64, torch.float32), (torch.float16, torch.float64),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize(("size", "strides"), [((3, 1), "dense"), ((129, 65), "transposed"), ((64, 600), "dense")])
def test_fold(backend, dtype, weight_dtype, size, strides):
    (k, c), count, where = size, 70, device(backend, dtype)
    weight, of = _weight(k, c, weight_dtype, strides), state(k, _wide(dtype))
    total = _random(c, seed=3) * count
    on = [t.to(where) for t in (weight, of, total)]
    folded, offset = (t.cpu() for t in ops.one_pass_fold(*on, count, dtype, backend=backend))
    assert folded.is_contiguous() and folded.dtype == dtype and offset.dtype == of.dtype
    assert torch.equal(folded, (of[2][:, None] * weight.flatten(1).to(of.dtype)).to(dtype))
    beta, centre = (of[3].double() + of[2].double() * of[0].double()), total / count
    terms = beta.abs() + (of[2] * of[0]).double().abs() + of[3].double().abs() + folded.double().abs() @ centre.abs()
    _close("offset", offset, beta - folded.double() @ centre, terms, of.dtype, 8)


@pytest.mark.parametrize("backend", backends_of("one_pass_products"))
@pytest.mark.parametrize(("dtype", "weight_dtype"), [
    (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float16, torch.float32),
    (torch.float16, torch.float16), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize(("size", "strides"), [((3, 1), "dense"), ((129, 65), "transposed"), ((200, 130), "dense")])
def test_products(backend, dtype, weight_dtype, size, strides):
    (k, c), count, wide, where = size, 70, _wide(dtype), device(backend, dtype)
    weight, of = _weight(k, c, weight_dtype, strides), state(k, wide)
    cross, sum_d, projected = (_random(k, c, seed=3)).to(wide), vector(k, wide, 4), _random(k, c, seed=5).to(wide)
    total, folded = _random(c, seed=6) * count, _random(k, c, seed=7).to(dtype)
    on = [t.to(where) for t in (cross, sum_d, weight, folded, of, projected, total)]
    arguments = (*on[:4], GramState(*on[4:]), count, dtype)
    results = ops.one_pass_products(*arguments, backend=backend)
    for name, first, second in zip("WγQc", results, ops.one_pass_products(*arguments, backend=backend), strict=True):
        assert torch.equal(first, second), f"{name} differs from call to call"
    grad_conv, grad_weight, quadratic, constant = (t.cpu() for t in results)
    assert grad_conv.dtype == weight_dtype and grad_conv.stride() == weight.stride()
    assert grad_weight.dtype == constant.dtype == wide and quadratic.dtype == dtype

    mean, invstd, scale, _ = of.double()
    matrix, cross, sum_d, projected = (t.double().reshape(k, -1) for t in (weight, cross, sum_d, projected))
    sum_d = sum_d[:, 0]
    gamma = invstd * ((matrix * cross).sum(1) - mean * sum_d)
    size_gamma = invstd * ((matrix * cross).abs().sum(1) + (mean * sum_d).abs())
    _close("dγ", grad_weight, gamma, size_gamma, wide, 16)
    c2, size_c2 = scale * invstd * gamma, (scale * invstd).abs() * size_gamma
    want = scale[:, None] * cross - torch.outer(scale * sum_d / count, total) - c2[:, None] * projected
    terms = scale.abs()[:, None] * cross.abs() + torch.outer((scale * sum_d / count).abs(), total.abs())
    terms += size_c2[:, None] * projected.abs()
    stored = EPS[weight_dtype] * want.abs() / EPS[wide]  # rounding of the stored result
    _close("dW", grad_conv.flatten(1), want, terms + stored, wide, 24)
    want = matrix.T @ (matrix * (c2 / count)[:, None])
    terms = matrix.abs().T @ (matrix.abs() * (size_c2 / count)[:, None])
    tiny = 6e-8 / EPS[wide] if dtype == torch.float16 else 0
    _close("Q", quadratic, want, terms + EPS[dtype] * want.abs() / EPS[wide] + tiny, wide, 24)
    assert backend == "reference" or torch.equal(quadratic, quadratic.T)
    centre, mean_d, folded = total / count, sum_d / count, folded.double()
    want = centre @ quadratic.double() - mean_d @ folded  # with the rounded Q
    terms = centre.abs() @ quadratic.double().abs() + mean_d.abs() @ folded.abs()
    _close("constant", constant, want, terms, wide, 16)


def test_errors():
    weight, vectors, gram = torch.ones(8, 4, 1, 1), torch.ones(8), torch.ones(4, 4, dtype=torch.float64)
    sums = Gram(torch.ones(4), torch.ones(4, dtype=torch.float64), gram)
    running = vectors.clone()
    for error, message, rest in (
        (ValueError, "one_pass_statistics: momentum must be a number", (running, running.clone(), None, None)),
        (TypeError, "one_pass_statistics: num_batches_tracked must be torch.int64", (None, None, torch.ones(()), 0.1)),
        (ValueError, "one_pass_statistics: running_var must have shape", (running, running[:2], None, 0.1)),
    ):
        with pytest.raises(error, match=message):
            ops.one_pass_statistics(weight, sums, 18, Norm(None, None, *rest, EPSILON), backend="reference")
    assert torch.equal(running, vectors)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ops.one_pass_statistics(weight, sums, 1, Norm(None, None, None, None, None, 0.1, EPSILON), backend="reference")


def test_backward_is_float32_under_autocast():
    """The C++ kernels read tensors by address, so autocast around the op must not change any operator inside it."""
    z = _random(2, 16, 5, 7, seed=3).float().to(memory_format=torch.channels_last)
    d = _random(2, 24, 5, 7, seed=4).float().to(memory_format=torch.channels_last)
    z, pivot, total, gram = ops.gram(z, None, backend="cpu")
    weight = _weight(24, 16, torch.float32)
    state, projected = ops.one_pass_statistics(
        weight, Gram(pivot, total, gram), 70, Norm(None, None, None, None, None, 0.1, EPSILON), backend="cpu"
    )
    arguments = (d, d.sum((0, 2, 3)), z, weight, GramState(state, projected, total))
    plain = ops.one_pass_backward(*arguments, backend="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.one_pass_backward(*arguments, backend="cpu")
    assert all(torch.equal(mine, other) for mine, other in zip(inside, plain, strict=True))
