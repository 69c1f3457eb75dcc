"""conv_wgrad against autograd in float64: taps over every edge, BatchNorm on load of each operand, splits, finalize."""

from __future__ import annotations

import pytest
import torch
from op_inputs import EPS, activation, assert_near, call, channels, device, state
from torch import Tensor
from torch.nn.functional import conv2d

from fusedres import ops
from fusedres.kernels.reference_core import pack_bits
from fusedres.ops._library import OPS

BACKENDS = ("reference", "cpu", "triton")
# (N, C, H, W), K, kernel, stride, padding, dilation
GEOMETRIES = (
    ((1, 7, 8, 7), 16, 3, 1, 1, 1),
    ((1, 65, 7, 9), 3, 3, 1, 1, 1),
    ((2, 3, 8, 7), 65, 3, 2, 1, 1),
    ((1, 5, 7, 10), 4, 3, 2, 1, 1),
    ((3, 1, 6, 6), 1, 3, 2, 1, 1),
    ((1, 129, 9, 8), 127, 1, 1, 0, 1),
    ((1, 127, 9, 6), 65, 1, 2, 0, 1),
    ((1, 3, 6, 5), 4, 1, 2, 1, 1),
    ((1, 5, 9, 9), 7, 3, 1, 2, 2),
    ((1, 5, 10, 9), 7, 3, 2, 2, 2),
    ((1, 3, 10, 9), 8, 7, 2, 3, 1),
    ((2, 6, 1, 1), 9, 3, 1, 1, 1),
    ((1, 6, 1, 1), 9, 1, 1, 0, 1),
    ((1, 4, 5, 6), 3, 2, 2, 0, 1),
)
SMALL = (GEOMETRIES[0], GEOMETRIES[6], GEOMETRIES[8])


@pytest.fixture(autouse=True)
def _without_tf32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


class Case:
    """The inputs of one call, its float64 result, and the sum of |terms| of the result."""

    def __init__(self, geometry, dtype: torch.dtype, h: bool = False, dy: bool = False, gate: bool = False) -> None:
        size, k, _, *rest = geometry
        self.dtype, c = dtype, size[1]
        self.input = activation(size, dtype, seed=30)
        self.pairs = [value if isinstance(value, tuple) else (value, value) for value in geometry[2:]]
        weight = torch.empty(k, c, *self.pairs[0], device="meta")
        shape = conv2d(torch.empty(size, device="meta"), weight, None, *rest)
        self.grad = activation(shape.shape, dtype, seed=31)
        self.y = activation(shape.shape, dtype, seed=32) if dy else None
        self.coefficients = state(k, dtype, seed=33) if dy else None
        self.gate = pack_bits(activation(shape.shape, torch.float32, seed=34) > 0) if gate else None
        self.input_state = state(c, dtype, seed=35) if h else None

    def arguments(self, backend: str) -> list:
        where = device(backend, self.dtype)
        tensors = (self.grad, self.gate, self.y, self.coefficients, self.input, self.input_state)
        return [None if t is None else t.to(where) for t in tensors] + self.pairs

    def partials(self, backend: str) -> Tensor:
        return OPS["conv_wgrad"](*OPS["conv_wgrad"].grouped(self.arguments(backend)), backend=backend)

    def run(self, backend: str) -> Tensor:
        return self.partials(backend).cpu()

    def want(self) -> tuple[Tensor, Tensor]:
        """Return dW in float64, without any rounding in between, and the sum of its |terms|."""
        h, dy = self.input.double(), self.grad.double()
        h_terms, dy_terms = h.abs(), dy.abs()
        if self.input_state is not None:
            scale, shift = (channels(row) for row in self.input_state[2:])
            h, h_terms = torch.relu(scale * h + shift), (scale * h).abs() + shift.abs()
        if self.y is not None:
            a, c1, mean, slope = (channels(row) for row in self.coefficients)
            if self.gate is not None:
                dy = dy * (activation(dy.shape, torch.float32, seed=34) > 0)
            y = self.y.double()
            dy_terms = a.abs() * (dy.abs() + c1.abs() + (y.abs() + mean.abs()) * slope.abs())
            dy = a * (dy - c1 - (y - mean) * slope)
        return self._sums(h, dy), self._sums(h_terms, dy_terms)

    def _sums(self, h: Tensor, dy: Tensor) -> Tensor:
        """Return the weight gradient (K, R, S, C) that autograd computes for a convolution of h."""
        kernel, stride, padding, dilation = self.pairs
        weight = torch.zeros(dy.shape[1], h.shape[1], *kernel, dtype=torch.float64, requires_grad=True)
        conv2d(h, weight, None, stride, padding, dilation).backward(dy)
        return weight.grad.permute(0, 2, 3, 1)

    def check(self, partials: Tensor, roundings: float = 8.0) -> None:
        want, terms = self.want()
        assert partials.shape[1:] == want.shape and partials.is_contiguous()
        assert partials.dtype is (torch.float64 if self.dtype is torch.float64 else torch.float32)
        if self.dtype in (torch.float16, torch.bfloat16) and not self.input_state is self.y is None:
            roundings = 1.1 * EPS[self.dtype] / EPS[torch.float32]  # both operands are rounded to storage
        assert_near("partials", partials.double().sum(0), want, terms, self.dtype, roundings)


@pytest.fixture
def force_split(monkeypatch):
    """Make the launcher cut its rows into tiles of 16, with `steps` tiles per split."""
    from fusedres.kernels.conv_wgrad import configs
    from fusedres.kernels.triton_core.launch import Config

    def force(steps: int) -> None:
        config = Config({"BLOCK_M": 16, "BLOCK_K": 32, "BLOCK_C": 16}, 4, 2)

        def plan(gradient, *_):
            grad = gradient.grad
            total = -(-(grad.numel() // grad.shape[1]) // 16)
            return configs.Plan((config,), config, steps, -(-total // steps))

        monkeypatch.setattr(configs, "plan", plan)

    return force


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("geometry", "h"), [(it, i % 2 == 1) for i, it in enumerate(GEOMETRIES)] + [(it, True) for it in SMALL], ids=str
)
def test_gradient(backend, geometry, h):
    case = Case(geometry, torch.float32, h=h)
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("h", "gate"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("geometry", SMALL, ids=str)
def test_batch_norm_backward_on_load(backend, geometry, h, gate):
    case = Case(geometry, torch.float32, h=h, dy=True, gate=gate)
    case.check(case.run(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("computed", [{}, {"h": True}, {"dy": True, "gate": True}], ids=str)
def test_dtypes(backend, dtype, computed):
    case = Case(((2, 19, 9, 7), 24, 3, 2, 1, 1), dtype, **computed)
    case.check(case.run(backend))


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("computed", [{"h": True}, {"dy": True}], ids=str)
@pytest.mark.parametrize("geometry", [((3, 5, 4, 3), 4, (2, 1), 1, 1, 1), ((2, 17, 9, 7), 33, 1, 2, 0, 1)], ids=str)
def test_splits_begin_and_end_anywhere(force_split, geometry, computed, steps):
    case = Case(geometry, torch.float32, **computed)
    force_split(steps)
    partials = case.run("triton")
    rows = case.grad.numel() // case.grad.shape[1]
    assert partials.shape[0] == max(1, -(-rows // (16 * steps)))
    case.check(partials)


def test_a_split_sums_its_own_rows(force_split):
    case = Case(((2, 5, 4, 4), 4, 1, 1, 0, 1), torch.float32)
    force_split(1)
    partials = case.run("triton")
    case.grad[1] = 0  # the 16 rows of the second image are the second split
    assert torch.equal(partials[0], case.run("triton")[0]) and not case.run("triton")[1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("stride", "size"), [(1, (6, 5)), (2, (7, 6))])
def test_padding_is_zero_after_the_affine_map(backend, stride, size):
    """With scale 0 and shift 1, h is 1 inside the image, so that each tap counts its pixels inside the image."""
    case = Case(((2, 3, *size), 4, 3, stride, 1, 1), torch.float32, h=True)
    case.grad.fill_(1)
    case.input_state[2], case.input_state[3] = 0, 1
    count = torch.ones(2, 3, *size)
    want = torch.nn.grad.conv2d_weight(count, (4, 3, 3, 3), case.grad, stride, 1).permute(0, 2, 3, 1)
    assert want[0, 0, 0, 0] < want[0, 1, 1, 0]
    assert torch.equal(case.run(backend).sum(0), want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h", [False, True])
def test_nan_and_inf_stay_in_their_channels_and_taps(backend, h):
    case = Case(((1, 5, 6, 6), 4, 3, 1, 1, 1), torch.float32, h=h)
    case.input[0, 1, 0, 0] = torch.nan  # a corner, which the lower right taps never reach with padding 1
    case.input[0, 3, 2, 2] = torch.inf
    if h:
        case.input_state[2] = case.input_state[2].abs()
    case.grad.abs_()
    got = case.run(backend).sum(0)
    seen = torch.ones(3, 3, dtype=torch.bool)
    seen[2, :] = seen[:, 2] = False
    assert torch.equal(got[..., 1].isnan(), seen.expand(4, 3, 3))
    assert (got[..., 3] == torch.inf).all()
    assert got[..., [0, 2, 4]].isfinite().all()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kernel", [3, 1])
@pytest.mark.parametrize("computed", ["h", "dy"])
def test_float16_does_not_overflow_where_nothing_is_loaded(backend, kernel, computed):
    """In a channel far from zero, a 0 in padding or after the last row would become inf, but no real value does."""
    case = Case(((1, 8, 5, 5), 16, kernel, 1, kernel // 2, 1), torch.float16, **{computed: True})
    if computed == "h":
        case.input[:, 0] = -300
        case.input_state[2:, 0] = torch.tensor([316.0, 94868.0])
    else:
        case.y[:, 0] = 200
        case.coefficients[:, 0] = torch.tensor([1.0, 0.0, 200.0, 400.0])
    partials = case.run(backend)
    assert partials.isfinite().all()
    case.check(partials)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_the_gradient_stays_in_its_channel(backend):
    case = Case(((1, 5, 6, 6), 4, 3, 1, 1, 1), torch.float32, h=True)
    case.grad[0, 2, 3, 3] = torch.nan
    got = case.run(backend).sum(0)
    assert got[2].isnan().all() and got[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("computed", [{"h": True}, {"h": True, "dy": True, "gate": True}], ids=str)
def test_results_repeat_bit_by_bit(force_split, computed):
    case = Case(((1, 17, 9, 8), 18, (1, 2), 2, 1, 1), torch.float32, **computed)
    force_split(1)
    weight = torch.empty(18, 17, 1, 2)
    first, again = (case.run("triton") for _ in range(2))
    assert first.shape[0] > 1 and torch.equal(first, again)
    sums = [
        ops.conv_wgrad_finalize([p.to(device("triton"))], [weight.to(device("triton"))], backend="triton")[0]
        for p in (first, again)
    ]
    assert torch.equal(*sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_finalize_adds_the_splits_and_keeps_the_layout(backend, count):
    where = device(backend)
    weights = [
        torch.empty(5, 7, 3, 3),
        torch.empty(65, 9, 3, 3, dtype=torch.float16).to(memory_format=torch.channels_last),
        torch.empty(3, 129, 1, 1, dtype=torch.bfloat16 if where == "cuda" or backend == "reference" else torch.float32),
        torch.empty(2, 4, 3, 5, dtype=torch.float64).transpose(2, 3),
    ][:count]
    partials = []
    for i, (weight, splits) in enumerate(zip(weights, (1, 21, 6, 4), strict=False)):
        k, c, r, s = weight.shape
        values = activation((splits * k, r, s, c), torch.float64, seed=i).contiguous().view(splits, k, r, s, c)
        partials.append(values if weight.dtype is torch.float64 else values.float())
    grads = ops.conv_wgrad_finalize([p.to(where) for p in partials], [w.to(where) for w in weights], backend=backend)
    for i, (grad, weight, partial) in enumerate(zip(grads, weights, partials, strict=True)):
        assert grad.dtype is weight.dtype and grad.stride() == weight.stride()
        want = partial.double().sum(0).permute(0, 3, 1, 2)
        terms = partial.double().abs().sum(0).permute(0, 3, 1, 2)
        assert_near(f"grad {i}", grad.cpu(), want, terms, partial.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layers_weight_gradient_is_autograds(backend):
    """The convolution has BatchNorm and ReLU before it and BatchNorm after it; both ops run in float64."""
    where = device(backend)
    case = Case(((2, 6, 7, 8), 10, 3, 2, 1, 1), torch.float64, h=True, dy=True, gate=True)
    weight = torch.empty(10, 6, 3, 3, dtype=torch.float64, device=where)
    partials = case.partials(backend)
    (got,) = ops.conv_wgrad_finalize([partials], [weight], backend=backend)
    want, terms = (it.permute(0, 3, 1, 2) for it in case.want())
    assert_near("weight.grad", got.cpu(), want, terms, torch.float64, 8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("computed", [{}, {"h": True, "dy": True, "gate": True}], ids=str)
def test_fakes_have_the_shapes_of_the_results(backend, computed):
    case = Case(((2, 9, 9, 8), 5, 1, 1, 0, 1), torch.float32, **computed)
    arguments = (*case.arguments(backend), backend)
    torch.library.opcheck(torch.ops.fusedres.conv_wgrad.default, arguments, test_utils="test_faketensor")
    partials = case.partials(backend)
    weights = [torch.empty(5, 9, 1, 1, device=partials.device), torch.empty(5, 9, 1, 1, device=partials.device).half()]
    arguments = ([partials, partials], weights, backend)
    torch.library.opcheck(torch.ops.fusedres.conv_wgrad_finalize.default, arguments, test_utils="test_faketensor")


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 14, 28, 55, 56, 112, 64, 641, 2**16 - 1, 2**30 + 1, 2**31 - 1])
def test_division_by_magic_numbers(divisor):
    from fusedres.kernels.conv_wgrad.triton import _magic

    magic, shift = _magic(divisor)
    assert 2**31 < magic < 2**32
    near = [q * divisor + r for q in (0, 1, 2, (2**31 - 1) // divisor) for r in (-1, 0, 1)]
    for m in [*(m for m in near if 0 <= m < 2**31), 2**31 - 1, 2**31 - 2]:
        assert (2 * m * magic >> 32) >> shift == m // divisor


def test_splits_fill_the_gpu_and_cover_the_rows():
    from fusedres.kernels.conv_wgrad.configs import _split

    assert _split(196, 1, 264, 8.0) == (1, 196)
    assert _split(12544, 9, 660, 4.0)[1] * 9 >= 0.9 * 528
    assert _split(49, 10_000, 132, 8.0)[1] == 1  # the tiles alone fill the GPU
    for total in (1, 2, 97, 12_543):
        for tiles in (1, 9, 144):
            steps, splits = _split(total, tiles, 264, 8.0)
            assert (splits - 1) * steps < total <= splits * steps


def test_errors():
    case = Case(((2, 4, 6, 6), 8, 3, 1, 1, 1), torch.float32, h=True, dy=True, gate=True)
    good = dict(
        zip(("grad", "gate", "y", "coefficients", "input", "input_state"), case.arguments("reference"), strict=False)
    )
    pairs = dict(zip(("kernel", "stride", "padding", "dilation"), case.pairs, strict=True))
    cases = [
        (ValueError, "grad must be dense and channels_last", {"grad": case.grad.contiguous()}),
        (ValueError, r"grad must have 4x4 pixels.* do stride, padding and dilation belong", {"padding": (0, 0)}),
        (ValueError, "y must have shape", {"y": case.y[:1]}),
        (ValueError, "coefficients must be given with y", {"coefficients": None}),
        (ValueError, "gate must be None without y", {"y": None, "coefficients": None}),
        (ValueError, "coefficients must have shape", {"coefficients": torch.zeros(3, 8)}),
        (TypeError, "coefficients must be torch.float32", {"coefficients": torch.zeros(4, 8).double()}),
        (ValueError, "gate must have shape", {"gate": case.gate[:1]}),
        (TypeError, "gate must be torch.uint8", {"gate": case.gate.int()}),
        (TypeError, "input must be torch.float32 like grad", {"input": case.input.double()}),
        (ValueError, "input_state must have shape", {"input_state": torch.zeros(4, 5)}),
        (ValueError, "stride must be two integers of at least 1", {"stride": (1, 0)}),
        (
            ValueError,
            "grad must have shape .* and not be empty",
            {"grad": case.grad[:0], "gate": None, "y": None, "coefficients": None},
        ),
    ]
    for error, message, change in cases:
        with pytest.raises(error, match=f"conv_wgrad: .*{message}"):
            call("conv_wgrad", "reference", **good | pairs | change)
    huge = torch.empty(2**17, 1, 128, 128, device="meta").to(memory_format=torch.channels_last)
    ones = ((1, 1), (1, 1), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="conv_wgrad: grad must have fewer than 2³¹ pixels"):
        OPS["conv_wgrad"].check(huge, None, None, None, huge, None, *ones, "reference")
    partial, weight = torch.zeros(2, 8, 3, 3, 4), torch.zeros(8, 4, 3, 3)
    cases = [
        (ValueError, "weights must be 1 to 4 tensors, got 5", [partial] * 5, [weight] * 5),
        (ValueError, "partials must be a list as long as weights, got 1 and 2", [partial], [weight] * 2),
        (
            ValueError,
            r"partials\[1\] must have shape \(T, 8, 3, 3, 4\) for weights\[1\]",
            [partial, partial[:, :7]],
            [weight] * 2,
        ),
        (ValueError, r"partials\[0\] must be contiguous", [partial.transpose(2, 3)], [weight]),
        (TypeError, r"partials\[0\] must be float32 or float64", [partial.half()], [weight]),
        (TypeError, r"weights\[0\] must be float32, float64, bfloat16 or float16", [partial], [weight.int()]),
    ]
    for error, message, partials, weights in cases:
        with pytest.raises(error, match=f"conv_wgrad_finalize: .*{message}"):
            ops.conv_wgrad_finalize(partials, weights, backend="reference")
