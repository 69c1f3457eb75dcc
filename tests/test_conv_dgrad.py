"""conv_dgrad against autograd in float64: every phase of a stride, BatchNorm on load, ReLU or shortcut on store."""

from __future__ import annotations

import pytest
import torch
from op_inputs import EPS, activation, assert_near, call, channels, device, state
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d

from fusedres import ops
from fusedres.kernels.reference_core import pack_bits
from fusedres.values import DENSE, Geometry, Gradient

BACKENDS = ("reference", "triton")
# (N, C, H, W), K, kernel, stride, padding, dilation
GEOMETRIES = (
    ((2, 64, 8, 8), 64, 3, 1, 1, 1),
    ((1, 65, 7, 9), 3, 3, 1, 1, 1),
    ((1, 129, 8, 7), 65, 3, 2, 1, 1),
    ((2, 3, 7, 9), 127, 3, 2, 1, 1),
    ((3, 1, 6, 6), 1, 3, 2, 1, 1),
    ((1, 8, 9, 8), 129, 1, 1, 0, 1),
    ((1, 127, 5, 6), 16, 1, 2, 0, 1),
    ((1, 3, 6, 5), 4, 1, 2, 1, 1),
    ((1, 5, 9, 9), 7, 3, 1, 2, 2),
    ((1, 5, 10, 9), 7, 3, 2, 2, 2),
    ((1, 5, 9, 10), 7, 3, 3, 1, 2),
    ((1, 3, 13, 12), 8, 7, 2, 3, 1),
    ((2, 6, 1, 1), 9, 3, 1, 1, 1),
    ((2, 6, 1, 1), 9, 3, 2, 1, 1),
    ((1, 4, 5, 6), 3, 2, 2, 0, 1),
)


def _weight(k: int, c: int, size: int, dtype: torch.dtype) -> Tensor:
    return activation((k, c, size, size), dtype, seed=20)


def _want(dy: Tensor, weight: Tensor, input_size, stride: int, padding: int, dilation: int) -> Tensor:
    x = torch.zeros(input_size, dtype=torch.float64, requires_grad=True)
    out = conv2d(x, weight.double(), None, stride, padding, dilation)
    return torch.autograd.grad(out, x, dy.double())[0]


def _case(geometry, dtype):
    """Return dy, weight, the gradient in float64, and the sum of |terms| of the gradient."""
    input_size, k, size, *rest = geometry
    weight = _weight(k, input_size[1], size, dtype)
    shape = conv2d(torch.empty(input_size, device="meta"), weight.float().to("meta"), None, *rest).shape
    dy = activation(shape, dtype, seed=21)
    return dy, weight, _want(dy, weight, input_size, *rest), _want(dy.abs(), weight.abs(), input_size, *rest)


def _run(backend, geometry, dy, weight, **arguments):
    input_size, _, _, *rest = geometry
    where = device(backend, dy.dtype)
    moved = {name: value.to(where) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    names = ("stride", "padding", "dilation")
    sizes = {name: (value, value) for name, value in zip(names, rest, strict=True)}
    moved |= {"grad": dy.to(where), "weight": weight.to(where), "input_size": input_size}
    dx, partials = call("conv_dgrad", backend, **sizes, **moved)
    assert dx.dtype == dy.dtype and dx.is_contiguous(memory_format=torch.channels_last)
    return dx.cpu(), partials.cpu()


def _assert_sums(partials, d, raw, norm, dtype):
    """Assert Σd and Σd·x̂ of the stored result."""
    products = d.double() * (raw.double() - channels(norm[0])) * channels(norm[1])
    terms = d.double().abs() * (raw.double().abs() + channels(norm[0]).abs()) * channels(norm[1])
    assert_near("Σd", partials[:, 0].sum(0), d.double().sum((0, 2, 3)), d.double().abs().sum((0, 2, 3)), dtype, 16)
    assert_near("Σd·x̂", partials[:, 1].sum(0), products.sum((0, 2, 3)), terms.sum((0, 2, 3)), dtype, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gradient_relu_and_shortcut(backend, geometry):
    dtype = torch.float32
    n, c, h, w = geometry[0]
    dy, weight, want, terms = _case(geometry, dtype)
    dx, partials = _run(backend, geometry, dy, weight)
    assert_near("dx", dx, want, terms, dtype, 32)
    assert partials.numel() == 0

    raw, norm = activation(geometry[0], dtype, 22), state(c, dtype)
    closed = channels(norm[2]) * raw.double() + channels(norm[3]) <= 0
    dx, partials = _run(backend, geometry, dy, weight, input=raw, input_state=norm)
    assert_near("masked", dx, want.masked_fill(closed, 0), terms, dtype, 32)
    _assert_sums(partials, dx, raw, norm, dtype)

    stride = 2 if h % 2 else 1
    shape = (n, c + 9, -(-h // stride), -(-w // stride))
    shortcut, active = activation(shape, dtype, 23), activation(shape, dtype, 24) > 0
    for gate in (None, pack_bits(active)):
        share = shortcut.double() if gate is None else (shortcut * active).double()
        added = want.clone()
        added[:, :, ::stride, ::stride] += share[:, :c]
        extra = {"shortcut": shortcut, "shortcut_gate": gate, "shortcut_stride": stride}
        dx, partials = _run(backend, geometry, dy, weight, **extra)
        assert_near("with shortcut", dx, added, terms + 4, dtype, 32)
        assert partials.numel() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("geometry", GEOMETRIES[2:6:3], ids=str)
def test_dtypes(backend, dtype, geometry):
    dy, weight, want, terms = _case(geometry, dtype)
    raw, norm = activation(geometry[0], dtype, 22), state(geometry[0][1], dtype)
    closed = channels(norm[2]) * raw.double() + channels(norm[3]) <= 0
    dx, partials = _run(backend, geometry, dy, weight, input=raw, input_state=norm)
    assert_near("masked", dx, want.masked_fill(closed, 0), terms, dtype, 32)
    _assert_sums(partials, dx, raw, norm, dtype)
    assert partials.dtype == norm.dtype

    shortcut = activation(geometry[0], dtype, 23)
    dx, _ = _run(backend, geometry, dy, weight, shortcut=shortcut)
    assert_near("rounded once", dx, want + shortcut.double(), terms + 4, dtype, 32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_gate", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [((1, 65, 9, 8), 129, 1, 1, 0, 1), ((2, 3, 5, 7), 64, 1, 2, 0, 1), ((1, 7, 4, 3), 3, 1, 1, 1, 1)],
    ids=str,
)
def test_batch_norm_backward_on_load(backend, dtype, with_gate, geometry):
    grad, weight, _, _ = _case(geometry, dtype)
    y, active = activation(grad.shape, dtype, 25), activation(grad.shape, torch.float32, 26) > 0
    coefficients = state(grad.shape[1], dtype, 27)
    a, c1, mean, k = (channels(row) for row in coefficients)
    d = (grad * active if with_gate else grad).double()
    dy = a * (d - c1 - (y.double() - mean) * k)
    size = (a * (d.abs() + c1.abs() + (y.double().abs() + mean.abs()) * k)).abs()
    want = _want(dy, weight, geometry[0], *geometry[3:])
    terms = _want(size, weight.abs(), geometry[0], *geometry[3:])
    roundings = 32 + EPS[dtype] / EPS[torch.float64 if dtype == torch.float64 else torch.float32]
    gate = pack_bits(active) if with_gate else None
    dx, _ = _run(backend, geometry, grad, weight, gate=gate, y=y, coefficients=coefficients)
    assert_near("dx", dx, want, terms, dtype, roundings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_chain_of_two_layers_is_autograds(backend, stride):
    """The chain is BatchNorm -> ReLU -> 3x3 -> BatchNorm -> ReLU -> 1x1 -> BatchNorm -> ReLU, run backward."""
    wide, c, k = torch.float64, 9, 20
    raw = activation((2, c, 7, 5), wide, 30)
    weights = (_weight(k, c, 3, wide), _weight(12, k, 1, wide))
    norms = [[activation((1, n, 1, 1), wide, seed).flatten() for seed in (31, 32)] for n in (c, k, 12)]
    leaves = [p.requires_grad_() for norm in norms for p in norm]
    raw.requires_grad_()

    def layer(x, norm):
        return batch_norm(x, None, None, *norm, training=True, eps=1e-5)

    z = [layer(raw, norms[0])]
    ys = [conv2d(z[0].relu(), weights[0], None, stride, 1)]
    z.append(layer(ys[0], norms[1]))
    ys.append(conv2d(z[1].relu(), weights[1]))
    z.append(layer(ys[1], norms[2]))
    grad = activation(tuple(z[2].shape), wide, 33)
    want = torch.autograd.grad(z[2].relu(), [*z, *ys, *leaves], grad)
    grad_norms = want[5:]

    def statistics(x, norm):
        var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
        invstd = (var + 1e-5).rsqrt()
        scale = norm[0].detach() * invstd
        return torch.stack((mean, invstd, scale, norm[1].detach() - scale * mean))

    def dense(x):
        return x.detach().contiguous(memory_format=torch.channels_last)

    states = [statistics(x, norm) for x, norm in zip((raw, *ys), norms, strict=True)]
    count = ys[1].numel() // 12
    mean, invstd, scale, _ = states[2]
    coefficients = torch.stack((scale, grad_norms[5] / count, mean, invstd * grad_norms[4] / count))
    geometry = (tuple(z[1].shape), 12, 1, 1, 0, 1)
    d, partials = _run(
        backend,
        geometry,
        grad,
        weights[1],
        gate=pack_bits(z[2] > 0),
        y=dense(ys[1]),
        coefficients=coefficients,
        input=dense(ys[0]),
        input_state=states[1],
    )
    assert torch.allclose(d, want[1], rtol=1e-10, atol=1e-12)
    sums = partials.sum(0)
    assert torch.allclose(sums, torch.stack((grad_norms[3], grad_norms[2])), rtol=1e-9, atol=1e-11)

    d, partials = _run(
        backend,
        ((2, c, 7, 5), k, 3, stride, 1, 1),
        dense(want[3]),
        weights[0],
        input=dense(raw),
        input_state=states[0],
    )
    assert torch.allclose(d, want[0], rtol=1e-10, atol=1e-12)
    assert torch.allclose(partials.sum(0), torch.stack((grad_norms[1], grad_norms[0])), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_go_where_autograd_sends_them(backend):
    geometry = ((1, 5, 8, 7), 6, 3, 2, 1, 1)
    dy, weight, _, _ = _case(geometry, torch.float32)
    dy[0, 2, 1, 1], dy[0, 3, 3, 3] = float("nan"), float("inf")
    want = _want(dy, weight, geometry[0], *geometry[3:])
    dx, _ = _run(backend, geometry, dy, weight)
    assert want.isnan().any() and want.isinf().any() and want.isfinite().any()
    assert torch.equal(dx.isnan(), want.isnan()) and torch.equal(dx.isinf(), want.isinf())

    raw, norm = activation(geometry[0], torch.float32, 22), state(5, torch.float32)
    raw[0, 1, 4, 4] = float("nan")  # the ReLU's input is NaN there, where torch lets the gradient pass
    z = (channels(norm[2]) * raw.double() + channels(norm[3])).requires_grad_()
    (masked,) = torch.autograd.grad(z.relu(), z, want)
    dx, partials = _run(backend, geometry, dy, weight, input=raw, input_state=norm)
    assert torch.equal(dx.isnan(), masked.isnan()) and torch.equal(dx == 0, masked == 0)
    assert dx[0, 1, 4, 4] == _run(backend, geometry, dy, weight)[0][0, 1, 4, 4]
    assert partials[:, 1].sum(0)[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_are_not_mixed_up(backend):
    weight = activation((6, 5, 3, 2), torch.float32, 20)
    sizes = {"stride": (2, 3), "padding": (0, 1), "dilation": (2, 1)}
    x = torch.zeros(2, 5, 9, 8, dtype=torch.float64, requires_grad=True)
    out = conv2d(x, weight.double(), None, *sizes.values())
    dy = activation(tuple(out.shape), torch.float32, 21)
    (want,) = torch.autograd.grad(out, x, dy.double())
    where = device(backend)
    geometry = Geometry(**sizes)
    dx, _ = ops.conv_dgrad(Gradient(dy.to(where)), weight.to(where), x.shape, geometry, backend=backend)
    assert torch.allclose(dx.cpu().double(), want, rtol=1e-4, atol=1e-4)


def test_results_repeat_bit_by_bit():
    geometry = ((2, 65, 9, 8), 40, 3, 2, 1, 1)
    dy, weight, _, _ = _case(geometry, torch.float32)
    extra = {"input": activation(geometry[0], torch.float32, 22), "input_state": state(65, torch.float32)}
    first, again = (_run("triton", geometry, dy, weight, **extra) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[2], GEOMETRIES[5]], ids=str)
def test_fake_has_the_shapes_of_the_result(backend, geometry):
    dy, weight, _, _ = _case(geometry, torch.float32)
    where = device(backend)
    raw, norm = activation(geometry[0], torch.float32).to(where), state(geometry[0][1], torch.float32).to(where)
    pair = [(value, value) for value in geometry[3:]]
    arguments = (dy.to(where), None, None, None, weight.to(where), list(geometry[0]), *pair, raw, norm, None, None, 1)
    torch.library.opcheck(torch.ops.fusedres.conv_dgrad.default, (*arguments, backend), test_utils="test_faketensor")


def test_offsets_are_wide_where_a_tensor_passes_two_to_the_31():
    import triton.language as tl

    from fusedres.kernels.conv_dgrad.triton import conv_dgrad
    from fusedres.kernels.triton_core.launch import record_launches

    def index(n):
        grad, weight = (torch.empty(shape, device="meta") for shape in ((n, 64, 128, 128), (64, 64, 1, 1)))
        with record_launches() as launches:
            conv_dgrad(Gradient(grad), weight, (n, 64, 128, 128), DENSE)
        return launches[0].arguments["INDEX"]

    assert index(2046) == tl.int32 and index(2048) == tl.int64


def test_wide_offsets_give_the_same(monkeypatch):
    from fusedres.kernels.conv_dgrad import triton as kernels

    geometry = ((2, 65, 9, 8), 40, 3, 2, 1, 1)
    dy, weight, _, _ = _case(geometry, torch.float32)
    extra = {"input": activation(geometry[0], torch.float32, 22), "input_state": state(65, torch.float32)}
    narrow = _run("triton", geometry, dy, weight, **extra)
    run, widths = kernels.launch, []

    def wide(kernel, grid, arguments, config, candidates):
        widths.append(arguments["INDEX"])
        run(kernel, grid, arguments | {"INDEX": kernels.tl.int64}, config, candidates)

    monkeypatch.setattr(kernels, "launch", wide)
    got = _run("triton", geometry, dy, weight, **extra)
    assert widths == [kernels.tl.int32]
    assert torch.equal(got[0], narrow[0]) and torch.equal(got[1], narrow[1])


def test_errors():
    geometry = ((2, 4, 6, 6), 8, 3, 1, 1, 1)
    dy, weight, _, _ = _case(geometry, torch.float32)
    raw, norm = activation(geometry[0], torch.float32), state(4, torch.float32)
    pointwise, bits = _weight(8, 4, 1, torch.float32), torch.zeros(2, 6, 6, 1, dtype=torch.uint8)
    coefficients, halved = torch.zeros(4, 8), activation((2, 4, 3, 3), torch.float32)
    plain = {"input_size": geometry[0], "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    same = {"padding": (1, 1)}
    cases = [
        (ValueError, "grad must have 4x4 pixels.* do stride, padding and dilation", (dy, weight), {}),
        (ValueError, "grad must be dense and channels_last", (dy.contiguous(), weight), same),
        (ValueError, "weight must be dense and channels_last", (dy, weight.contiguous()), same),
        (TypeError, "weight must be torch.float32 like grad", (dy, weight.double()), same),
        (ValueError, "weight must have shape .* grouped convolutions", (dy, _weight(8, 2, 3, torch.float32)), same),
        (ValueError, "stride must be two integers of at least 1", (dy, weight), same | {"stride": (1, 0)}),
        (
            ValueError,
            "y must be None unless the weight is 1x1",
            (dy, weight),
            same | {"y": dy, "coefficients": coefficients},
        ),
        (ValueError, "gate must be None without y", (dy, pointwise), {"gate": bits}),
        (ValueError, "coefficients must be None without y", (dy, pointwise), {"coefficients": coefficients}),
        (ValueError, "coefficients must be given with y", (dy, pointwise), {"y": dy}),
        (ValueError, "coefficients must have shape", (dy, pointwise), {"y": dy, "coefficients": torch.zeros(3, 8)}),
        (ValueError, "input must have shape", (dy, weight), same | {"input": raw[:1], "input_state": norm}),
        (ValueError, "input_state must be given with input", (dy, weight), same | {"input": raw}),
        (ValueError, "input_state must be None without input", (dy, weight), same | {"input_state": norm}),
        (ValueError, "shortcut must .*was the downsample", (dy, weight), same | {"shortcut": halved}),
        (ValueError, "shortcut_gate must be None without", (dy, weight), same | {"shortcut_gate": bits}),
        (
            ValueError,
            "shortcut must be None with input",
            (dy, weight),
            same | {"input": raw, "input_state": norm, "shortcut": raw},
        ),
    ]
    for error, message, (grad, kernel), arguments in cases:
        with pytest.raises(error, match=f"conv_dgrad: {message}"):
            call("conv_dgrad", "reference", grad=grad, weight=kernel, **plain | arguments)
    with pytest.raises(RuntimeError, match="there is no cpu backend; use 'reference'"):
        call("conv_dgrad", "cpu", grad=dy, weight=weight, **plain | same)
