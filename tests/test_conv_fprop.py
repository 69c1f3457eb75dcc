"""conv_fprop against torch's convolution in float64."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch
from conv_inputs import BACKENDS, CONVOLUTIONS, assert_conv_near, expected, inputs, random_weight, zeros
from op_inputs import activation, device

from fusedres import ops
from fusedres.kernels.conv_fprop import taps
from fusedres.kernels.triton_core.launch import INTERPRETED, Config, record_launches
from fusedres.values import Geometry, Raw

pytestmark = pytest.mark.usefixtures("full_precision")


def _merged(partials, rows):
    """Merge the tiles to one mean and variance in float64 (Chan, Golub and LeVeque 1983)."""
    partials, rows = partials.double().cpu(), rows.double().cpu()[:, None]
    mean = (partials[:, 0] * rows).sum(0) / rows.sum()
    return mean, (partials[:, 1] + rows * (partials[:, 0] - mean) ** 2).sum(0) / rows.sum()


def _check(backend, convolution, dtype, with_state):
    x, weight, affine, geometry = inputs(backend, convolution, dtype, with_state)
    y, partials, rows = ops.conv_fprop(Raw(x, affine), weight, geometry, True, backend=backend)
    want, terms = expected(x, weight, affine, geometry)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_conv_near("y", y, want, terms, dtype)
    assert partials.dtype == rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rows.sum().item() == y.numel() // y.shape[1]
    mean, variance = _merged(partials, rows)
    stored = y.double().cpu()
    largest = stored.abs().amax((0, 2, 3))
    assert_conv_near("mean", mean, stored.mean((0, 2, 3)), largest, dtype, ulps=0)
    assert_conv_near("variance", variance, stored.var((0, 2, 3), correction=0), largest**2, dtype, ulps=0)
    plain, *nothing = ops.conv_fprop(Raw(x, affine), weight, geometry, False, backend=backend)
    assert torch.equal(plain, y) and [t.numel() for t in nothing] == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
def test_convolution_and_statistics(backend, convolution, with_state):
    _check(backend, convolution, torch.float32, with_state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("convolution", [CONVOLUTIONS[0], CONVOLUTIONS[4], CONVOLUTIONS[9]])
def test_dtypes(backend, dtype, convolution):
    _check(backend, convolution, dtype, True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tf32(backend):
    """If torch's convolutions may use TF32, products have at least 10 bits of mantissa."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    x, weight, _, geometry = inputs(backend, CONVOLUTIONS[0], torch.float32, False)
    y, _, _ = ops.conv_fprop(Raw(x, None), weight, geometry, False, backend=backend)
    want, terms = expected(x, weight, None, geometry)
    assert ((y.double().cpu() - want).abs() <= 2.0**-9 * terms).all()


def _configured(monkeypatch, config):
    """Make every launch use this config."""
    for module in ("triton", "configs"):
        monkeypatch.setattr(f"fusedres.kernels.conv_fprop.{module}.choose", lambda *_: config)


def _pointers(flat, table):
    return Config({"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 32, "FLAT": flat, "TABLE": table}, 4, 2)


@pytest.mark.parametrize(("flat", "table"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("convolution", [CONVOLUTIONS[0], CONVOLUTIONS[1], CONVOLUTIONS[2], CONVOLUTIONS[10]])
def test_every_way_to_load(monkeypatch, convolution, flat, table):
    _configured(monkeypatch, _pointers(flat, table))
    _check("triton", convolution, torch.float32, True)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    "convolution",
    [
        (2, 32, 5, 7, 65, (3, 3), (1, 1), (1, 1), (1, 1)),
        (1, 64, 9, 8, 8, (3, 3), (1, 1), (2, 2), (2, 2)),
        (3, 64, 5, 5, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    ],
)
def test_loads_by_descriptors(monkeypatch, convolution, with_state):
    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors are for Hopper and later")
    from fusedres.kernels.conv_fprop.configs import DescriptorConfig

    _configured(monkeypatch, DescriptorConfig({"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 32}, 4, 2))
    _check("triton", convolution, torch.float32, with_state)


def test_no_descriptors_where_a_base_is_not_aligned(monkeypatch):
    """TensorDescriptor refuses a view that does not start at a multiple of 16 bytes."""
    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors are for Hopper and later")
    monkeypatch.setattr("fusedres.kernels.conv_fprop.configs.INTERPRETED", False)
    monkeypatch.setattr("fusedres.kernels.conv_fprop.configs.choose", lambda candidates, *_: candidates[-1])
    where = device("triton")
    x = activation((2, 64, 5, 5), torch.float16).to(where)
    weight = random_weight(64, 64, (3, 3), torch.float16).to(where)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=where)[1:].view(2, 5, 5, 64).permute(0, 3, 1, 2)
    shifted.copy_(x)
    names, results, same = [], [], Geometry((1, 1), (1, 1), (1, 1))
    for pair in ((x, weight), (shifted, weight)):
        with record_launches() as made:
            results.append(ops.conv_fprop(Raw(pair[0], None), pair[1], same, False, backend="triton")[0])
        names += [launch.name for launch in made]
    assert names == ["conv_fprop_descriptor_kernel", "conv_fprop_kernel"]
    assert torch.allclose(*results, rtol=1e-3, atol=1e-3)


class _Tables:
    """Tap tables that start from an empty dictionary, and the threads that built them."""

    def __init__(self, monkeypatch):
        self.threads, self.kept, build = [], {}, taps._build

        def counted(axes, where):
            self.threads.append(threading.get_ident())
            return build(axes, where)

        monkeypatch.setattr(taps, "_build", counted)
        monkeypatch.setattr(taps, "_tables", self.kept)

    def of(self, size, is_cuda=False):
        x = SimpleNamespace(shape=(1, 64, size, size), device=torch.device("cpu"), is_cuda=is_cuda)
        return taps.tap_table(x, SimpleNamespace(shape=(64, 64, 3, 3)), Geometry((1, 1), (1, 1), (1, 1)))


def test_tap_tables_are_built_once_in_a_thread_of_their_own(monkeypatch):
    """Memory that the caller's thread allocates may belong to the pool of a graph that torch.compile is warming up."""
    tables = _Tables(monkeypatch)
    table = tables.of(5)
    assert table.sum() == 25 + 4 * 20 + 4 * 16 and tables.of(5) is table and tables.of(6) is not table
    assert len(tables.threads) == 2 and threading.get_ident() not in tables.threads


def test_tap_tables_are_bounded(monkeypatch):
    tables = _Tables(monkeypatch)
    monkeypatch.setattr(taps, "_MOST_TABLES", 2)
    first, _, third = (tables.of(size) for size in (5, 6, 7))
    assert tables.of(5) is first and len(tables.kept) == 2
    assert tables.of(7) is not third and torch.equal(tables.of(7), third)


def test_tap_tables_while_a_graph_is_captured(monkeypatch):
    """An existing table is used, because it lives forever; a new table belongs to the graph and is not kept."""
    tables = _Tables(monkeypatch)
    kept = tables.of(5)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tables.of(5, is_cuda=True) is kept and len(tables.threads) == 1
    tables.of(6, is_cuda=True)
    assert len(tables.kept) == 1 and tables.threads[-1] == threading.get_ident()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_zero_after_the_affine_map(backend):
    """With x = 0 and shift = 1 a corner sums 4 ones, an edge 6, the inside 9. Wrong padding would give 9 everywhere."""
    x = torch.zeros(1, 32, 4, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(1, 32, 3, 3).contiguous(memory_format=torch.channels_last)
    weight[0, 0] = 1
    affine = torch.zeros(4, 32)
    affine[3] = 1
    where = device(backend)
    y, _, _ = ops.conv_fprop(
        Raw(x.to(where), affine.to(where)), weight.to(where), Geometry((1, 1), (1, 1), (1, 1)), False, backend=backend
    )
    want = torch.full((4, 5), 9.0)
    want[[0, -1]], want[:, [0, -1]] = 6, 6
    want[[0, 0, -1, -1], [0, -1, 0, -1]] = 4
    assert torch.equal(y[0, 0].cpu(), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_values_far_from_zero(backend):
    """With mean 1e4 and deviation 0.1, sums and sums of squares in float32 would give a negative variance."""
    where = device(backend)
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 16, 13, 11, generator=generator, dtype=torch.float64) * 0.1 + 1e4).float()
    x = x.contiguous(memory_format=torch.channels_last).to(where)
    weight = torch.eye(16).view(16, 16, 1, 1).contiguous(memory_format=torch.channels_last).to(where)
    y, partials, rows = ops.conv_fprop(Raw(x, None), weight, Geometry((1, 1), (0, 0), (1, 1)), True, backend=backend)
    assert torch.equal(y, x)
    mean, variance = _merged(partials, rows)
    stored = y.double().cpu()
    assert torch.allclose(mean, stored.mean((0, 2, 3)), rtol=2e-7, atol=0)
    assert torch.allclose(variance, stored.var((0, 2, 3), correction=0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_state", [False, True])
def test_nan_reaches_the_pixels_that_see_it_and_no_other(backend, with_state):
    x, weight, affine, geometry = inputs(backend, CONVOLUTIONS[0], torch.float32, with_state)
    x[1, 7, 0, 8] = torch.nan  # the first row of the second image, in memory after the last row of the first
    y, _, _ = ops.conv_fprop(Raw(x, affine), weight, geometry, False, backend=backend)
    assert torch.equal(y.isnan().cpu(), expected(x, weight, affine, geometry)[0].isnan())


@pytest.mark.parametrize("with_state", [False, True])
def test_nan_of_the_image_beside_is_no_padding(monkeypatch, with_state):
    from fusedres.kernels.conv_fprop.configs import DescriptorConfig

    if not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors are for Hopper and later")
    _configured(monkeypatch, DescriptorConfig({"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 32}, 4, 2))
    x, weight, affine, geometry = inputs(
        "triton", (2, 32, 5, 7, 8, (3, 3), (1, 1), (1, 1), (1, 1)), torch.float32, with_state
    )
    x[1, 7, 0, 0] = torch.nan
    y, _, _ = ops.conv_fprop(Raw(x, affine), weight, geometry, False, backend="triton")
    assert torch.equal(y.isnan().cpu(), expected(x, weight, affine, geometry)[0].isnan())


def test_same_bits_every_time():
    x, weight, affine, geometry = inputs("triton", CONVOLUTIONS[1], torch.float32, True)
    first = ops.conv_fprop(Raw(x, affine), weight, geometry, True, backend="triton")
    for _ in range(3):
        assert all(
            torch.equal(*pair)
            for pair in zip(
                first, ops.conv_fprop(Raw(x, affine), weight, geometry, True, backend="triton"), strict=True
            )
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("with_statistics", [False, True])
def test_meta_tensors_have_the_results_shapes(backend, with_statistics):
    x, weight, affine, geometry = inputs(backend, CONVOLUTIONS[1], torch.float32, True)
    got = ops.conv_fprop(Raw(x, affine), weight, geometry, with_statistics, backend=backend)
    raw = Raw(x.to("meta"), affine.to("meta"))
    meta = ops.conv_fprop(raw, weight.to("meta"), geometry, with_statistics, backend=backend)
    assert [(t.shape, t.stride(), t.dtype) for t in got] == [(t.shape, t.stride(), t.dtype) for t in meta]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend):
    x, weight, affine, geometry = inputs(backend, CONVOLUTIONS[0], torch.float32, True)
    y, _, _ = ops.conv_fprop(Raw(x[:0], affine), weight, geometry, False, backend=backend)
    assert y.shape == (0, 65, 7, 9)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_conv_fprop_errors():
    x, weight = zeros(2, 8, 5, 5), zeros(4, 8, 3, 3)
    one, none = (1, 1), (0, 0)
    cases = [
        (ValueError, "x must be dense and channels_last", (x.contiguous(), weight, None, one, one, one)),
        (TypeError, r"weight must be torch\.float32 like x", (x, weight.double(), None, one, one, one)),
        (ValueError, r"weight must have shape \(K, 8, R, S\) for x", (x, zeros(4, 4, 3, 3), None, one, one, one)),
        (ValueError, "weight must be dense and channels_last", (x, weight.contiguous(), None, one, one, one)),
        (ValueError, "weight must have shape .* and not be empty", (x, zeros(0, 8, 3, 3), None, one, one, one)),
        (ValueError, r"x_state must have shape \(4, 8\)", (x, weight, torch.zeros(4, 4), one, one, one)),
        (TypeError, r"x_state must be torch\.float32", (x, weight, torch.zeros(4, 8).double(), one, one, one)),
        (ValueError, r"stride must be two integers of at least 1, got \(0, 1\)", (x, weight, None, (0, 1), one, one)),
        (ValueError, "padding must be two integers of at least 0", (x, weight, None, one, (0, -1), one)),
        (ValueError, "dilation must be two integers of at least 1", (x, weight, None, one, one, (1, 0))),
        (ValueError, "x must be at least as large as the dilated weight", (x, weight, None, one, none, (3, 1))),
    ]  # fmt: skip
    for error, message, (x, weight, affine, *geometry) in cases:
        with pytest.raises(error, match=f"conv_fprop: .*{message}"):
            ops.conv_fprop(Raw(x, affine), weight, Geometry(*geometry), True, backend="reference")
    with pytest.raises(RuntimeError, match="there is no nonsense backend"):
        ops.conv_fprop(Raw(x, None), weight, Geometry(one, one, one), True, backend="nonsense")
