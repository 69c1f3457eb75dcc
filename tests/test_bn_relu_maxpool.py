"""BatchNorm, ReLU and 3x3 max-pool in one op, and its backward, against float64: ties, edges, NaN, gates."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_inputs import DTYPES, activation, assert_near, backends_of, channels, device, state

from fusedres import ops
from fusedres.values import BnBranch, Norm, Pooled

# (N, C, H, W): height and width are 1 and 2, odd and even, and no multiples of the vector width or of a tile
SHAPES = (
    (2, 3, 5, 6),
    (2, 64, 1, 1),
    (1, 65, 2, 7),
    (3, 1, 9, 1),
    (4, 5, 2, 2),
    (1, 127, 1, 4),
    (2, 129, 6, 3),
    (2, 64, 9, 18),
)

CLOSED = 9  # the place that stands for a window with a closed ReLU


def _inputs(shape, dtype, backend, seed=0):
    where = device(backend, dtype)
    x, affine = activation(shape, dtype, seed).to(where), state(shape[1], dtype, seed).to(where)
    return x, affine


def _pooled(shape):
    return (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2)


def _index(argmax, width):
    """Convert places in the windows to torch's indices into the image."""
    top = 2 * torch.arange(argmax.shape[2], device=argmax.device).view(-1, 1) - 1
    left = 2 * torch.arange(argmax.shape[3], device=argmax.device) - 1
    return (top + argmax.long() // 3) * width + left + argmax.long() % 3


def _identity(count, dtype):
    return torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=dtype).view(4, 1).repeat(1, count)


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(backend, dtype, shape):
    x, affine = _inputs(shape, dtype, backend)
    z = (x.double() * channels(affine[2]) + channels(affine[3])).relu()
    want = F.max_pool2d(z, 3, 2, 1)
    terms = F.max_pool2d((x.double() * channels(affine[2])).abs() + channels(affine[3]).abs(), 3, 2, 1)
    out, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    assert out.dtype == dtype and argmax.dtype == torch.uint8 and argmax.shape == out.shape == _pooled(shape)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert argmax.is_contiguous(memory_format=torch.channels_last)
    assert_near("out", out, want, terms, dtype)
    assert torch.equal(argmax == CLOSED, out <= 0)
    index = _index(argmax.masked_fill(argmax == CLOSED, 4), shape[3])  # 4 is the centre, where the ReLU is 0 too
    winners = z.flatten(2).gather(2, index.flatten(2)).view(want.shape)
    assert_near("value at argmax", winners, want, terms + 1e-30, torch.float64 if dtype == torch.float64 else dtype)
    alone, nothing = ops.bn_relu_maxpool(x, affine, backend=backend)
    assert torch.equal(alone, out) and nothing.numel() == 0


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
@pytest.mark.parametrize("shape", [(2, 17, 6, 7), (1, 64, 5, 5), (3, 2, 1, 2)])
@pytest.mark.parametrize("values", [(-2, 2), (-1, 3), (-3, 0), (1, 2)])
def test_the_first_of_equal_maxima_wins(backend, shape, values):
    """A few small integers give ties everywhere. In a closed window the ReLU is 0 everywhere, and no place counts."""
    x = torch.randint(*values, shape).float().contiguous(memory_format=torch.channels_last).to(device(backend))
    out, argmax = ops.bn_relu_maxpool(x, _identity(shape[1], torch.float32).to(x.device), True, backend=backend)
    want, index = F.max_pool2d(x.relu(), 3, 2, 1, return_indices=True)
    assert torch.equal(out, want)
    assert torch.equal(argmax == CLOSED, want <= 0)
    assert torch.equal(_index(argmax, shape[3])[want > 0], index[want > 0])


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_pass_as_in_torch(backend, dtype):
    x, _ = _inputs((2, 33, 9, 9), dtype, backend)
    x[:, :, 2, 3], x[:, :, 3, 4], x[:, :, 6, 6] = torch.nan, torch.nan, torch.inf
    x[1, :, 6:9, 0:3] = -torch.inf
    affine = _identity(33, torch.float64 if dtype == torch.float64 else torch.float32).to(x.device)
    out, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    want, index = F.max_pool2d(x.relu(), 3, 2, 1, return_indices=True)
    assert int(out.isnan().sum()) == int(want.isnan().sum()) > 0
    assert torch.equal(out.nan_to_num(-1.0, 1e4), want.nan_to_num(-1.0, 1e4))
    assert torch.equal(argmax == CLOSED, want <= 0)  # a window with NaN is open
    assert torch.equal(_index(argmax, 9)[argmax != CLOSED], index[argmax != CLOSED])
    # NaN lets the gradient pass to the same place as in torch
    grad = torch.ones_like(out)
    grad_x, _ = ops.bn_relu_maxpool_backward(Pooled(grad, argmax), BnBranch(x, affine, False), backend=backend)
    leaf = x.clone().requires_grad_()
    F.max_pool2d(leaf.relu(), 3, 2, 1).backward(grad)
    assert torch.equal(grad_x, leaf.grad)


def _want(grad, argmax, x, affine, batch_statistics):
    """Return grad_x, Σd, Σd·x̂, and the terms of each, in float64, computed by scattering."""
    closed = argmax == CLOSED
    open_grad = torch.where(closed, 0.0, grad.double()).flatten(2)
    index = _index(argmax.masked_fill(closed, 4), x.shape[3]).flatten(2)
    zeros = torch.zeros(x.shape, dtype=torch.float64, device=x.device).flatten(2)
    d, d_terms = (zeros.scatter_add(2, index, values).view(x.shape) for values in (open_grad, open_grad.abs()))
    mean, invstd, scale, _ = (channels(row) for row in affine)
    normalised = (x.double() - mean) * invstd
    size = normalised.abs() + (mean * invstd).abs()
    sum_d, product = d.sum((0, 2, 3)), (d * normalised).sum((0, 2, 3))
    sum_terms, product_terms = d_terms.sum((0, 2, 3)), (d_terms * size).sum((0, 2, 3))
    grad_x, terms = scale * d, scale.abs() * d_terms
    if batch_statistics:
        count = x.numel() // x.shape[1]
        grad_x = scale * (d - channels(sum_d / count) - normalised * channels(product / count))
        terms = terms + scale.abs() * (channels(sum_terms / count) + size * channels(product_terms / count))
    return grad_x, terms, sum_d, sum_terms, product, product_terms


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch_statistics", [True, False])
def test_backward(backend, dtype, shape, batch_statistics):
    x, affine = _inputs(shape, dtype, backend)
    grad = activation(_pooled(shape), dtype, seed=5).to(x.device)
    _, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    kept = grad.clone()
    saved = (grad, argmax, x, affine)
    arguments = Pooled(grad, argmax), BnBranch(x, affine, batch_statistics)
    grad_x, sums = ops.bn_relu_maxpool_backward(*arguments, backend=backend)
    assert torch.equal(grad, kept)
    assert grad_x.shape == x.shape and grad_x.is_contiguous(memory_format=torch.channels_last)
    want, terms, sum_d, sum_terms, product, product_terms = _want(*saved, batch_statistics)
    assert_near("grad_x", grad_x, want, terms, dtype, 16)
    assert_near("sum d", sums[0], sum_d, sum_terms, dtype, 16)
    assert_near("sum d·x̂", sums[1], product, product_terms, dtype, 16)
    if not batch_statistics:
        without, _ = ops.bn_relu_maxpool_backward(*arguments, with_sums=False, backend=backend)
        assert torch.equal(without, grad_x)
    in_place = ops.bn_relu_maxpool_backward_(*arguments, backend=backend)
    assert torch.equal(x, grad_x) and torch.equal(in_place, sums)


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
def test_gradients_are_autograds(backend):
    """Compare the whole op with torch's own chain in float64, with statistics of x."""
    x = activation((3, 19, 7, 10), torch.float64, seed=2)
    weight, bias = torch.linspace(-1, 1.5, 19).double().requires_grad_(), torch.linspace(-0.5, 1, 19).double()
    bias.requires_grad_()
    leaf = x.clone().requires_grad_()
    want = F.max_pool2d(F.batch_norm(leaf, None, None, weight, bias, True).relu(), 3, 2, 1)
    grad = activation(want.shape, torch.float64, seed=3)
    want.backward(grad)
    x, grad, w, b = (t.detach().to(device(backend)) for t in (x, grad, weight, bias))
    affine = ops.bn_statistics(x, Norm(w, b, None, None, None, 0.1, 1e-5), backend="reference")
    out, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    grad_x, sums = ops.bn_relu_maxpool_backward(Pooled(grad, argmax), BnBranch(x, affine, True), backend=backend)
    torch.testing.assert_close(out.cpu(), want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_x.cpu(), leaf.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(sums.cpu(), torch.stack((bias.grad, weight.grad)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
def test_closed_windows_send_nothing(backend):
    x, _ = _inputs((1, 18, 6, 6), torch.float32, backend)
    affine = _identity(18, torch.float32).to(x.device)
    x[:, :9] = -x[:, :9].abs()
    out, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    grad = torch.full_like(out, torch.nan)
    grad[:, 9:] = 1.0
    grad_x, sums = ops.bn_relu_maxpool_backward(Pooled(grad, argmax), BnBranch(x, affine, False), backend=backend)
    assert not grad_x[:, :9].any() and not sums[:, :9].any()
    assert torch.equal(sums[0, 9:], (out[:, 9:] > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
def test_constant_statistics_ignore_x(backend):
    """As in eager, dx = scale·d, whatever the values of x are."""
    x, affine = _inputs((2, 8, 5, 5), torch.float32, backend)
    out, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    grad = torch.ones_like(out)
    arguments = Pooled(grad, argmax), BnBranch(x, affine, False), False
    want, _ = ops.bn_relu_maxpool_backward(*arguments, backend=backend)
    x[0, :, 0, 0] = torch.nan
    got, _ = ops.bn_relu_maxpool_backward(*arguments, backend=backend)
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", backends_of("bn_relu_maxpool"))
def test_an_empty_batch(backend):
    x, affine = activation((2, 4, 5, 6), torch.float32)[:0].to(device(backend)), state(4, torch.float32)
    affine = affine.to(x.device)
    out, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    assert out.shape == argmax.shape == (0, 4, 3, 3)
    grad_x, sums = ops.bn_relu_maxpool_backward(Pooled(out, argmax), BnBranch(x, affine, True), backend=backend)
    assert grad_x.shape == x.shape and not sums.any()


@pytest.mark.parametrize("shape", [(4, 64, 30, 28), (3, 65, 17, 9)])
def test_same_bits_on_any_number_of_threads(shape):
    x, affine = _inputs(shape, torch.float32, "cpu")
    grad = activation(_pooled(shape), torch.float32, seed=5)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out, argmax = ops.bn_relu_maxpool(x, affine, True, backend="cpu")
        results.append(
            (out, *ops.bn_relu_maxpool_backward(Pooled(grad, argmax), BnBranch(x, affine, True), backend="cpu"))
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_fakes_have_the_real_shapes():
    x, affine = _inputs((2, 5, 7, 6), torch.bfloat16, "cpu")
    real = ops.bn_relu_maxpool(x, affine, True, backend="cpu")
    real += ops.bn_relu_maxpool_backward(Pooled(real[0], real[1]), BnBranch(x, affine, True), backend="cpu")
    x, affine = x.to("meta"), affine.to("meta")
    fake = ops.bn_relu_maxpool(x, affine, True, backend="triton")
    fake += ops.bn_relu_maxpool_backward(Pooled(fake[0], fake[1]), BnBranch(x, affine, True), backend="triton")
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_errors():
    x, affine = _inputs((2, 4, 5, 6), torch.float32, "cpu")
    with pytest.raises(ValueError, match="bn_relu_maxpool: state must have shape"):
        ops.bn_relu_maxpool(x, affine[:, :3], backend="cpu")
    with pytest.raises(ValueError, match="bn_relu_maxpool: x must be dense and channels_last"):
        ops.bn_relu_maxpool(x.contiguous(), affine, backend="cpu")
    with pytest.raises(
        ValueError, match=r"bn_relu_maxpool: x must have shape .* and not be empty.*, got \(2, 4, 0, 6\)"
    ):
        ops.bn_relu_maxpool(torch.empty(2, 4, 0, 6).to(memory_format=torch.channels_last), affine, backend="cpu")
    out, argmax = ops.bn_relu_maxpool(x, affine, True, backend="cpu")

    def refused(error, message, grad=out, argmax=argmax):
        with pytest.raises(error, match=f"bn_relu_maxpool_backward: {message}"):
            ops.bn_relu_maxpool_backward(Pooled(grad, argmax), BnBranch(x, affine, True), backend="cpu")

    refused(ValueError, r"grad must have shape \(2, 4, 3, 3\) for x", grad=x)
    refused(TypeError, "grad must be torch.float32 like x", grad=out.double())
    refused(TypeError, "argmax must be torch.uint8, got torch.int64", argmax=argmax.long())
    refused(ValueError, "argmax must have shape .*with_argmax=True", argmax=torch.empty(0, dtype=torch.uint8))
