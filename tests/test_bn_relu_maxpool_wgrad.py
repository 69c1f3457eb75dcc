"""The weight gradient of a stem's convolution, with dy formed on load, and its sums, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_inputs import EPS, activation, assert_near, call, channels, device, state
from torch import Tensor

from fusedres import ops
from fusedres.ops._library import OPS
from fusedres.values import BnBranch, BnGradient, Geometry, Norm, NormState, Pooled

BACKENDS = ("reference", "triton")
CLOSED = 9  # the place that stands for a window with a closed ReLU
# (N, C, H, W), K, kernel, stride, padding, dilation: a stem's; odd and even outputs, edges of tiles, 1x1
GEOMETRIES = (
    ((2, 3, 15, 18), 64, 7, 2, 3, 1),
    ((1, 3, 33, 37), 19, 7, 2, 3, 1),
    ((2, 1, 9, 8), 65, 3, 1, 1, 1),
    ((1, 32, 6, 7), 5, 3, 1, 1, 1),
    ((1, 5, 10, 9), 129, (3, 2), (1, 2), (1, 0), (2, 1)),
    ((3, 4, 4, 5), 7, 1, 1, 0, 1),
    ((2, 3, 1, 1), 6, 7, 2, 3, 1),
)


@pytest.fixture(autouse=True)
def _without_tf32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


class Case:
    """The inputs of one call, its float64 result, and the sum of |terms| of the result."""

    def __init__(self, geometry, dtype: torch.dtype, constant: bool = False) -> None:
        size, k, *pairs = geometry
        self.dtype, c = dtype, size[1]
        self.pairs = [value if isinstance(value, tuple) else (value, value) for value in pairs]
        self.input = activation(size, dtype, seed=40)
        weight = torch.empty(k, c, *self.pairs[0], device="meta")
        shape = F.conv2d(torch.empty(size, device="meta"), weight, None, *self.pairs[1:]).shape
        self.y = activation(shape, dtype, seed=41)
        self.state = state(k, dtype, seed=42)
        self.pooled, self.argmax = ops.bn_relu_maxpool(self.y, self.state, True, backend="reference")
        self.grad = activation(self.pooled.shape, dtype, seed=43)
        self.coefficients = state(k, dtype, seed=44)
        if constant:
            self.coefficients[1::2] = 0

    def arguments(self, backend: str) -> list:
        where = device(backend, self.dtype)
        tensors = (self.grad, self.argmax, self.y, self.coefficients, self.input)
        return [tensor.to(where) for tensor in tensors] + self.pairs

    def run(self, backend: str) -> Tensor:
        op = OPS["bn_relu_maxpool_wgrad"]
        return op(*op.grouped(self.arguments(backend)), backend=backend).cpu()

    def scattered(self, grad: Tensor) -> Tensor:
        """Return in float64 what every open window sends to its pixel."""
        n, k, rows, columns = grad.shape
        padded = torch.zeros(n, k, 2 * rows + 1, 2 * columns + 1, dtype=torch.float64)
        for place in range(9):
            row, column = place // 3, place % 3
            sent = grad.double() * (self.argmax == place)
            padded[:, :, row : row + 2 * rows : 2, column : column + 2 * columns : 2] += sent
        return padded[:, :, 1 : 1 + self.y.shape[2], 1 : 1 + self.y.shape[3]]

    def check(self, partials: Tensor) -> None:
        a, c1, mean, slope = (channels(row) for row in self.coefficients)
        y = self.y.double()
        dy = a * (self.scattered(self.grad) - c1 - (y - mean) * slope)
        terms = a.abs() * (self.scattered(self.grad.abs()) + c1.abs() + (y.abs() + mean.abs()) * slope.abs())
        want, size = self._sums(self.input.double(), dy), self._sums(self.input.double().abs(), terms)
        assert partials.shape[1:] == want.shape and partials.is_contiguous()
        assert partials.dtype is (torch.float64 if self.dtype is torch.float64 else torch.float32)
        half = self.dtype in (torch.float16, torch.bfloat16)
        roundings = 1.1 * EPS[self.dtype] / EPS[torch.float32] if half else 8.0  # dy is rounded to storage
        assert_near("partials", partials.double().sum(0), want, size, self.dtype, roundings)

    def _sums(self, h: Tensor, dy: Tensor) -> Tensor:
        """Return the weight gradient (K, R, S, C) that autograd computes for a convolution of h."""
        kernel, *geometry = self.pairs
        weight = torch.zeros(dy.shape[1], h.shape[1], *kernel, dtype=torch.float64, requires_grad=True)
        F.conv2d(h, weight, None, *geometry).backward(dy)
        return weight.grad.permute(0, 2, 3, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradient(backend, geometry, constant):
    case = Case(geometry, torch.float32, constant)
    assert (case.argmax == CLOSED).any()
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("geometry", GEOMETRIES[1:3], ids=str)
def test_dtypes(backend, dtype, geometry):
    case = Case(geometry, dtype)
    case.check(case.run(backend))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("block_n", [16, 64])
def test_splits_and_tiles_begin_and_end_anywhere(monkeypatch, steps, block_n):
    from fusedres.kernels.bn_relu_maxpool import configs
    from fusedres.kernels.triton_core.launch import Config

    config = Config({"BLOCK_P": 2, "BLOCK_Q": 8, "BLOCK_K": 16, "BLOCK_N": block_n}, 4, 1)

    def plan(grad, *_):
        tiles = grad.shape[0] * -(-grad.shape[2] // 2) * -(-grad.shape[3] // 8)
        return configs.WgradPlan((config,), config, tiles, steps, -(-tiles // steps))

    monkeypatch.setattr(configs, "wgrad_plan", plan)
    case = Case(((3, 3, 11, 19), 17, 3, 1, 1, 1), torch.float32)
    partials = case.run("triton")
    assert partials.shape[0] == -(-3 * 3 * 2 // steps)
    case.check(partials)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_is_autograds(backend):
    """Compare sums, coefficients, weight gradient and its finalize with torch's own stem, with batch statistics."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 3, 13, 18, generator=generator, dtype=torch.float64).to(memory_format=torch.channels_last)
    conv = torch.randn(10, 3, 7, 7, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.linspace(-1, 1.5, 10).double().requires_grad_()
    bias = torch.linspace(-0.5, 1, 10).double().requires_grad_()
    y = F.conv2d(x, conv, None, 2, 3)
    pooled = F.max_pool2d(F.batch_norm(y, None, None, weight, bias, True).relu(), 3, 2, 1)
    grad = activation(pooled.shape, torch.float64, seed=7)
    pooled.backward(grad)
    where = device(backend)
    y = y.detach().contiguous(memory_format=torch.channels_last).to(where)
    x, grad = x.to(where), grad.to(where)
    affine = ops.bn_statistics(
        y, Norm(weight.detach().to(where), bias.detach().to(where), None, None, None, 0.1, 1e-5), backend="reference"
    )
    _, argmax = ops.bn_relu_maxpool(y, affine, True, backend=backend)
    partials = ops.bn_relu_maxpool_reduce(Pooled(grad, argmax), y, affine, backend=backend)
    count = y.numel() // 10
    sums, coefficients, _ = ops.bn_backward_coefficients(partials, count, NormState(affine, True), backend=backend)
    partials = ops.bn_relu_maxpool_wgrad(
        Pooled(grad, argmax), BnGradient(y, coefficients), x, (7, 7), Geometry((2, 2), (3, 3), (1, 1)), backend=backend
    )
    (grad_conv,) = ops.conv_wgrad_finalize([partials], [conv.detach().to(where)], backend=backend)
    torch.testing.assert_close(grad_conv.cpu(), conv.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(sums.cpu(), torch.stack((bias.grad, weight.grad)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (1, 65, 2, 7), (2, 129, 9, 18), (1, 4, 1, 1)])
def test_sums_are_those_of_the_whole_backward(backend, dtype, shape):
    where = device(backend, dtype)
    x, affine = activation(shape, dtype, 1).to(where), state(shape[1], dtype, 1).to(where)
    pooled, argmax = ops.bn_relu_maxpool(x, affine, True, backend=backend)
    grad = activation(pooled.shape, dtype, 2).to(where)
    _, want = ops.bn_relu_maxpool_backward(Pooled(grad, argmax), BnBranch(x, affine, True), backend=backend)
    partials = ops.bn_relu_maxpool_reduce(Pooled(grad, argmax), x, affine, backend=backend)
    terms = grad.double().abs().sum((0, 2, 3)) * (1 + x.double().abs().amax((0, 2, 3)) * affine[1].double() * 4)
    assert_near("sums", partials.sum(0), want.double(), terms.expand(2, -1), dtype, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_windows_send_nothing(backend):
    case = Case(GEOMETRIES[0], torch.float32)
    case.coefficients[1::2] = 0
    case.argmax.fill_(CLOSED)
    case.grad.fill_(torch.nan)
    assert not case.run(backend).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_statistics_ignore_y(backend):
    case = Case(GEOMETRIES[0], torch.float32, constant=True)
    want = case.run(backend)
    case.y.fill_(torch.inf)
    assert torch.equal(case.run(backend), want) and want.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_outside_of_a_tile_do_not_overflow(backend):
    """In float16, y = 0 would give an infinite dy, but the real values of y do not."""
    case = Case(GEOMETRIES[1], torch.float16)
    case.y.fill_(1000)
    case.coefficients[:] = torch.tensor([1.0, 0.0, 1000.0, 1000.0]).view(4, 1)
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_channel_of_nan_stays_its_own(backend):
    case = Case(GEOMETRIES[1], torch.float32)
    want = case.run(backend)
    case.coefficients[:, 2] = torch.nan
    got = case.run(backend)
    assert got[:, 2].isnan().all()
    got[:, 2] = want[:, 2]
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fakes_have_the_shapes_of_the_results(backend):
    case = Case(GEOMETRIES[1], torch.float32)
    arguments = (*case.arguments(backend), backend)
    torch.library.opcheck(torch.ops.fusedres.bn_relu_maxpool_wgrad.default, arguments, test_utils="test_faketensor")
    arguments = (*arguments[:3], case.state.to(arguments[0].device), backend)
    torch.library.opcheck(torch.ops.fusedres.bn_relu_maxpool_reduce.default, arguments, test_utils="test_faketensor")


def test_errors():
    case = Case(((2, 3, 8, 6), 4, 3, 1, 1, 1), torch.float32)
    good = dict(zip(("grad", "argmax", "y", "y_coefficients", "input"), case.arguments("reference"), strict=False))
    good |= dict(zip(("kernel", "stride", "padding", "dilation"), case.pairs, strict=True))
    cases = [
        (ValueError, r"grad must have shape \(2, 4, 4, 3\) for y \(2, 4, 8, 6\)", {"grad": case.y}),
        (TypeError, "argmax must be torch.uint8", {"argmax": case.argmax.long()}),
        (ValueError, "y must be dense and channels_last", {"y": case.y.contiguous()}),
        (ValueError, "y_coefficients must have shape", {"y_coefficients": torch.zeros(4, 3)}),
        (TypeError, "input must be torch.float32 like y", {"input": case.input.double()}),
        (ValueError, r"y must have 6x4 pixels.* do stride, padding and dilation belong", {"padding": (0, 0)}),
        (ValueError, "dilation must be two integers of at least 1", {"dilation": (0, 1)}),
    ]
    for error, message, change in cases:
        with pytest.raises(error, match=f"bn_relu_maxpool_wgrad: {message}"):
            call("bn_relu_maxpool_wgrad", "reference", **good | change)
    empty = Pooled(case.grad[:0], case.argmax[:0]), case.y[:0], case.state
    with pytest.raises(ValueError, match=r"bn_relu_maxpool_reduce: x must have shape .* and not be empty"):
        ops.bn_relu_maxpool_reduce(*empty, backend="reference")
    with pytest.raises(ValueError, match="bn_relu_maxpool_reduce: state must have shape"):
        ops.bn_relu_maxpool_reduce(Pooled(case.grad, case.argmax), case.y, torch.zeros(4, 3), backend="reference")
    with pytest.raises(RuntimeError, match="bn_relu_maxpool_wgrad: there is no cpu backend"):
        call("bn_relu_maxpool_wgrad", "cpu", **good)
