"""packed_convolution_out against torch's convolution and the same epilogue in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conv_inputs import CONVOLUTIONS, assert_conv_near, expected, random_weight
from op_inputs import activation, call, vector
from torch import Tensor

from fusedres import _C, ops
from fusedres.kernels.packed_convolution import winograd_is_faster
from fusedres.values import Geometry, Packed

NHWC = torch.channels_last
BACKENDS = ("reference", "cpu")
# Also: several panels and a ragged one, several blocks of the depth, several tasks, few channels (whole rows of the
# kernel at once, also with images that are wider than a task and with a kernel that is larger than the image).
LARGER = (
    (2, 130, 9, 11, 100, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 2100, 5, 5, 33, (1, 1), (1, 1), (0, 0), (1, 1)),
    (3, 64, 17, 19, 64, (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, 3, 40, 230, 64, (7, 7), (2, 2), (3, 3), (1, 1)),
    (3, 5, 6, 500, 8, (3, 3), (1, 1), (1, 1), (2, 1)),
    (2, 15, 9, 9, 40, (3, 3), (1, 1), (2, 2), (1, 2)),
    (2, 3, 2, 2, 7, (5, 5), (1, 1), (2, 2), (1, 1)),
    (1, 1200, 3, 3, 65, (3, 3), (1, 1), (1, 1), (1, 1)),
)
# For Winograd's algorithm: odd and even images, smaller than a tile too, any padding, ragged channels, several tasks.
WINOGRAD = tuple(
    (*sizes, (3, 3), (1, 1), padding, (1, 1))
    for *sizes, padding in (
        (2, 16, 6, 8, 32, (1, 1)),
        (3, 17, 7, 5, 33, (1, 1)),
        (1, 40, 3, 4, 7, (0, 0)),
        (2, 24, 4, 9, 50, (2, 1)),
        (1, 20, 1, 1, 16, (1, 1)),
        (2, 16, 2, 5, 31, (1, 3)),
        (2, 70, 23, 21, 97, (1, 1)),
        (3, 300, 5, 6, 40, (1, 1)),
        (1, 512, 7, 7, 65, (1, 1)),
    )
)
ALGORITHMS = [False, True]


def convolved(
    backend: str,
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    bias: Tensor,
    shortcut: Tensor | None = None,
    relu: bool = True,
    winograd: bool = False,
) -> Tensor:
    """Pack the weight and return the convolution."""
    panels = ops.pack_weight(weight, list(geometry.dilation), None, winograd, backend=backend)
    shape = geometry.output_shape(x.shape, weight.shape)
    out = torch.full(shape, torch.nan).contiguous(memory_format=NHWC)
    packed = Packed(panels, bias, list(weight.shape[2:]), winograd)
    ops.packed_convolution_out(x, packed, geometry, shortcut, relu, out, backend=backend)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("convolution", "winograd"),
    [*((each, False) for each in (*CONVOLUTIONS, *LARGER, *WINOGRAD)), *((each, True) for each in WINOGRAD)],
)
def test_packed_convolution(backend: str, convolution: tuple, winograd: bool) -> None:
    n, c, h, w, k, kernel, *rest = convolution
    geometry = Geometry(*rest)
    x, weight, bias = activation((n, c, h, w), torch.float32), random_weight(k, c, kernel, torch.float32), vector(k)
    y, terms = expected(x, weight, None, geometry)
    y, terms = y + bias.double().view(1, -1, 1, 1), terms + bias.double().abs().view(1, -1, 1, 1)
    shortcut = activation(tuple(y.shape), torch.float32, seed=5)
    for relu in (True, False):
        for added in (None, shortcut):
            want = y if added is None else y + added.double()
            got = convolved(backend, x, weight, geometry, bias, added, relu, winograd)
            bound = terms if added is None else terms + added.double().abs()
            assert_conv_near("out", got, want.relu() if relu else want, bound, torch.float32)


@pytest.mark.parametrize("winograd", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_layout_of_the_weight(backend: str, winograd: bool) -> None:
    x, weight, scale = (
        activation((2, 33, 7, 6), torch.float32),
        random_weight(40, 33, (3, 3), torch.float32),
        vector(40),
    )
    geometry, bias = Geometry((1, 1), (1, 1), (1, 1)), vector(40, seed=3)
    scaled = weight * scale.view(-1, 1, 1, 1)
    want = convolved(backend, x, scaled, geometry, bias, None, False, winograd)
    for given in (weight, weight.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3)):
        panels = ops.pack_weight(given, [1, 1], scale, winograd, backend=backend)
        out = torch.empty_like(want)
        packed = Packed(panels, bias, [3, 3], winograd)
        ops.packed_convolution_out(x, packed, geometry, None, False, out, backend=backend)
        assert torch.equal(out, want)


@pytest.mark.parametrize("winograd", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend: str, winograd: bool) -> None:
    """NaN and infinities reach exactly the pixels whose windows hold them, and pass the ReLU as in torch."""
    x, weight = activation((3, 20, 9, 8), torch.float32), random_weight(50, 20, (3, 3), torch.float32)
    x[0, 3, 4, 4], x[1, 7, 0, 0], x[0, 5, 8, 7] = torch.nan, torch.inf, -torch.inf
    geometry, bias = Geometry((1, 1), (1, 1), (1, 1)), vector(50)
    shortcut = activation((3, 50, 9, 8), torch.float32, seed=2)
    shortcut[1, 5, 8, 7] = -torch.inf
    raw = torch.conv2d(x, weight, bias, 1, 1)
    for relu, want in ((True, (raw + shortcut).relu()), (False, raw + shortcut)):
        got = convolved(backend, x, weight, geometry, bias, shortcut, relu, winograd)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert convolved(backend, x, weight, geometry, bias, shortcut, True, winograd)[1, 5, 8, 7] == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_winograd_of_values_whose_differences_overflow(backend: str) -> None:
    x, weight = torch.zeros(1, 16, 4, 4).contiguous(memory_format=NHWC), torch.zeros(32, 16, 3, 3)
    x[0, :, 1, 1], x[0, :, 1, 3] = 3e38, -3e38
    weight[:, 0, 1, 1] = 1
    got = convolved(backend, x, weight, Geometry((1, 1), (1, 1), (1, 1)), torch.zeros(32), None, False, True)
    assert torch.equal(got, x[:, :1].expand(1, 32, 4, 4))


@pytest.mark.parametrize("winograd", ALGORITHMS)
def test_results_do_not_depend_on_the_threads_or_the_batch(winograd: bool) -> None:
    x, weight, bias = (
        activation((3, 70, 15, 14), torch.float32),
        random_weight(70, 70, (3, 3), torch.float32),
        vector(70),
    )
    geometry, threads = Geometry((1, 1), (1, 1), (1, 1)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(convolved("cpu", x, weight, geometry, bias, winograd=winograd))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for image in range(3):
        one = x[image : image + 1].contiguous(memory_format=NHWC)
        got = convolved("cpu", one, weight, geometry, bias, winograd=winograd)
        assert torch.equal(got, results[0][image : image + 1])


def test_winograd_rounds_no_worse_than_torch() -> None:
    x, weight = activation((2, 128, 28, 28), torch.float32).relu(), random_weight(128, 128, (3, 3), torch.float32)
    want = torch.conv2d(x.double(), weight.double(), None, 1, 1)
    got = convolved("cpu", x, weight, Geometry((1, 1), (1, 1), (1, 1)), torch.zeros(128), None, False, True)
    assert (got - want).abs().max() < 1.5 * (torch.conv2d(x, weight, None, 1, 1) - want).abs().max()


def test_where_winograd_is_chosen() -> None:
    geometry = Geometry((1, 1), (1, 1), (1, 1))

    def is_chosen(x: tuple, weight: tuple, geometry: Geometry, packed_before: bool = True) -> bool:
        return winograd_is_faster(x, weight, geometry, packed_before=packed_before)

    vectorised = _C.build_info()["isa_used"] != "portable"
    for faster, x, weight in (
        (vectorised, (1, 64, 56, 56), (64, 64, 3, 3)),
        (False, (1, 64, 56, 56), (64, 64, 5, 5)),
        (False, (1, 64, 56, 56), (64, 64, 1, 1)),
        (False, (1, 3, 224, 224), (64, 3, 3, 3)),
        (False, (1, 512, 4, 4), (512, 512, 3, 3)),
        (False, (0, 64, 56, 56), (64, 64, 3, 3)),
    ):
        assert is_chosen(x, weight, geometry) is faster
    x, weight = (1, 64, 56, 56), (64, 64, 3, 3)
    assert not is_chosen(x, weight, geometry._replace(stride=(2, 2)))
    assert not is_chosen(x, weight, geometry._replace(dilation=(2, 2)))
    assert not is_chosen((1, 64, 7, 7), weight, geometry, packed_before=False)
    assert is_chosen((1, 64, 7, 7), weight, geometry) is vectorised


@pytest.mark.parametrize("isa", _C.build_info()["isa_built"])
def test_every_instruction_set(isa: str) -> None:
    if isa == "avx512" and _C.build_info()["isa_used"] != "avx512":
        pytest.skip("this processor has no AVX-512")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::test_packed_convolution"],
        env={**os.environ, "FUSEDRES_ISA": isa, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_an_empty_batch() -> None:
    weight, geometry = random_weight(8, 4, (3, 3), torch.float32), Geometry((1, 1), (1, 1), (1, 1))
    x = activation((2, 4, 5, 5), torch.float32)[:0]
    assert convolved("cpu", x, weight, geometry, vector(8)).shape == (0, 8, 5, 5)


def test_errors() -> None:
    x, out = activation((2, 4, 5, 5), torch.float32), activation((2, 8, 5, 5), torch.float32)
    weight = random_weight(8, 4, (3, 3), torch.float32)
    panels = ops.pack_weight(weight, [1, 1], backend="cpu")
    right = {"x": x, "panels": panels, "bias": vector(8), "kernel": [3, 3], "with_relu": True, "out": out}
    right |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "winograd": False}
    for changed, error, message in (
        ({"panels": panels[:-1].clone()}, ValueError, "panels must have .* elements, .*pack_weight"),
        ({"kernel": [5, 5], "padding": [2, 2]}, ValueError, "panels must have"),
        ({"kernel": [1, 1], "padding": [0, 0]}, ValueError, "panels must have"),
        ({"winograd": True}, ValueError, "winograd must be False but for 3x3 weights of 16 channels"),
        ({"x": x.double()}, TypeError, "x must be torch.float32"),
        ({"shortcut": out[:1]}, ValueError, "shortcut must have"),
        ({"shortcut": out}, RuntimeError, "share"),
        ({"bias": vector(7)}, ValueError, "out must"),
    ):
        with pytest.raises(error, match=f"packed_convolution_out: .*{message}"):
            call("packed_convolution_out", "cpu", **right | changed)


def test_what_winograd_does_not_take() -> None:
    x, weight = activation((2, 16, 5, 5), torch.float32), random_weight(8, 16, (3, 3), torch.float32)
    for shape, dilation in (((8, 16, 5, 5), [1, 1]), ((8, 15, 3, 3), [1, 1]), ((8, 16, 3, 3), [1, 2])):
        with pytest.raises(ValueError, match="pack_weight: winograd must be False but for 3x3 weights"):
            ops.pack_weight(torch.zeros(shape), dilation, None, True, backend="cpu")
    panels = {winograd: ops.pack_weight(weight, [1, 1], None, winograd, backend="cpu") for winograd in ALGORITHMS}
    for winograd, geometry, message in (
        (True, Geometry((2, 1), (1, 1), (1, 1)), "winograd must be False"),
        (True, Geometry((1, 1), (1, 1), (1, 2)), "winograd must be False"),
        (False, Geometry((1, 1), (1, 1), (1, 1)), "panels must have .* elements, .*algorithm"),
    ):
        out = torch.zeros(geometry.output_shape(x.shape, weight.shape)).contiguous(memory_format=NHWC)
        packed = Packed(panels[True], vector(8), [3, 3], winograd)
        with pytest.raises(ValueError, match=f"packed_convolution_out: {message}"):
            ops.packed_convolution_out(x, packed, geometry, None, True, out, backend="cpu")
