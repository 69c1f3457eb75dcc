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


def convolved(
    backend: str, x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor, shortcut: Tensor | None, relu: bool
) -> Tensor:
    """Pack the weight and return the convolution."""
    panels = ops.pack_weight(weight, list(geometry.dilation), backend=backend)
    shape = geometry.output_shape(x.shape, weight.shape)
    out = torch.full(shape, torch.nan).contiguous(memory_format=NHWC)
    kernel = list(weight.shape[2:])
    ops.packed_convolution_out(x, Packed(panels, bias, kernel), geometry, shortcut, relu, out, backend=backend)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("convolution", [*CONVOLUTIONS, *LARGER])
def test_packed_convolution(backend: str, convolution: tuple) -> None:
    n, c, h, w, k, kernel, *rest = convolution
    geometry = Geometry(*rest)
    x, weight, bias = activation((n, c, h, w), torch.float32), random_weight(k, c, kernel, torch.float32), vector(k)
    y, terms = expected(x, weight, None, geometry)
    y, terms = y + bias.double().view(1, -1, 1, 1), terms + bias.double().abs().view(1, -1, 1, 1)
    shortcut = activation(tuple(y.shape), torch.float32, seed=5)
    for relu in (True, False):
        for added in (None, shortcut):
            want = y if added is None else y + added.double()
            got = convolved(backend, x, weight, geometry, bias, added, relu)
            bound = terms if added is None else terms + added.double().abs()
            assert_conv_near("out", got, want.relu() if relu else want, bound, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_layout_of_the_weight(backend: str) -> None:
    x, weight, scale = (
        activation((2, 33, 7, 6), torch.float32),
        random_weight(40, 33, (3, 3), torch.float32),
        vector(40),
    )
    geometry, bias = Geometry((1, 1), (1, 1), (1, 1)), vector(40, seed=3)
    scaled = weight * scale.view(-1, 1, 1, 1)
    want = convolved(backend, x, scaled, geometry, bias, None, False)
    for given in (weight, weight.contiguous(), weight.transpose(2, 3).contiguous().transpose(2, 3)):
        panels = ops.pack_weight(given, [1, 1], scale, backend=backend)
        out = torch.empty_like(want)
        ops.packed_convolution_out(x, Packed(panels, bias, [3, 3]), geometry, None, False, out, backend=backend)
        assert torch.equal(out, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values(backend: str) -> None:
    """NaN and infinities reach exactly the pixels whose windows hold them, and pass the ReLU as in torch."""
    x, weight = activation((2, 20, 9, 8), torch.float32), random_weight(48, 20, (3, 3), torch.float32)
    x[0, 3, 4, 4], x[1, 7, 0, 0] = torch.nan, torch.inf
    geometry, bias = Geometry((1, 1), (1, 1), (1, 1)), vector(48)
    shortcut = activation((2, 48, 9, 8), torch.float32, seed=2)
    shortcut[1, 5, 8, 7] = -torch.inf
    want = (torch.conv2d(x, weight, bias, 1, 1) + shortcut).relu()
    got = convolved(backend, x, weight, geometry, bias, shortcut, True)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isposinf(), want.isposinf())
    assert got[1, 5, 8, 7] == 0


def test_results_do_not_depend_on_the_threads_or_the_batch() -> None:
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
            results.append(convolved("cpu", x, weight, geometry, bias, None, True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for image in range(3):
        one = x[image : image + 1].contiguous(memory_format=NHWC)
        assert torch.equal(convolved("cpu", one, weight, geometry, bias, None, True), results[0][image : image + 1])


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
    assert convolved("cpu", x, weight, geometry, vector(8), None, True).shape == (0, 8, 5, 5)


def test_errors() -> None:
    x, out = activation((2, 4, 5, 5), torch.float32), activation((2, 8, 5, 5), torch.float32)
    weight = random_weight(8, 4, (3, 3), torch.float32)
    panels = ops.pack_weight(weight, [1, 1], backend="cpu")
    right = {"x": x, "panels": panels, "bias": vector(8), "kernel": [3, 3], "with_relu": True, "out": out}
    right |= {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    for changed, error, message in (
        ({"panels": panels[:-1].clone()}, ValueError, "panels must have .* elements, .*pack_weight"),
        ({"kernel": [5, 5], "padding": [2, 2]}, ValueError, "panels must have"),
        ({"kernel": [1, 1], "padding": [0, 0]}, ValueError, "panels must have"),
        ({"x": x.double()}, TypeError, "x must be torch.float32"),
        ({"shortcut": out[:1]}, ValueError, "shortcut must have"),
        ({"shortcut": out}, RuntimeError, "share"),
        ({"bias": vector(7)}, ValueError, "out must"),
    ):
        with pytest.raises(error, match=f"packed_convolution_out: .*{message}"):
            call("packed_convolution_out", "cpu", **right | changed)
