"""The fused stem when its convolution runs in kernels of this package: numbers, gradients, operators."""

from __future__ import annotations

import copy

import pytest
import torch
from eager import trust
from fusion import FORMATS, expect_paths, label
from reference import Values, collect, run, stem_oracle
from stems import DTYPES, FUSED, NCHW, NHWC, Listing, off_the_interpreter, stem, twin_of
from tolerance import check
from torch import Tensor, nn

import fusedres
from fusedres.autograd import path_counts


def run_images(model: nn.Module, x: Tensor, grad: Tensor, autocast: torch.dtype | None = None) -> Values:
    """Do what reference.run does, with images that need no gradient, as in training."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(x)
    out.backward(grad.to(out.dtype))
    return collect(model, x, out)


OWN = [("reference", m, d, f) for m in ("train", "eval", "frozen") for d in DTYPES[:2] for f in FORMATS]
OWN += [("triton", "train", torch.float32, NCHW), ("triton", "train", torch.float16, NHWC)]
OWN += [("triton", "eval", torch.float64, NHWC), ("triton", "frozen", torch.float32, NHWC)]


@pytest.mark.parametrize(("backend", "mode", "dtype", "memory_format"), OWN, ids=label)
def test_own_convolution(backend: str, mode: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """If the images need a gradient, dy is stored; otherwise it is formed on load."""
    off_the_interpreter(backend)
    model, x, grad = stem(dtype, memory_format, mode)
    oracle = stem_oracle(model, x, grad)
    for execute in (run, run_images):
        eager = execute(copy.deepcopy(model), x, grad)
        with fusedres.use_backend(backend), expect_paths(**FUSED):
            got = execute(twin_of(model, "fused"), x, grad)
        assert got.keys() == eager.keys()
        check(got, eager, oracle, dtype, f"{backend} {mode} {execute.__name__}")
    with torch.no_grad(), fusedres.use_backend(backend):
        assert torch.equal(twin_of(model, "fused")(x), got["out"])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_own_convolution_under_autocast(backend: str) -> None:
    off_the_interpreter(backend)
    model, x, grad = stem(torch.float32, NHWC)
    trust(model, x, torch.float16)
    eager = run_images(copy.deepcopy(model), x, grad, torch.float16)
    with fusedres.use_backend(backend), expect_paths(**FUSED):
        got = run_images(twin_of(model, "fused"), x, grad, torch.float16)
    assert got["grad.conv1.weight"].dtype == torch.float32
    check(got, eager, stem_oracle(model, x, grad), torch.float16, backend)


@pytest.mark.parametrize("wanted", [("conv1",), ("bn1.weight",), ("bn1.bias", "conv1"), ("maxpool", "x")], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_own_convolution_makes_only_wanted_gradients(wanted: tuple[str, ...], mode: str, backend: str) -> None:
    off_the_interpreter(backend)
    model, x, grad = stem(torch.float64, mode=mode)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    grads = []
    for each in (model, twin_of(model, "fused")):
        leaf = x.clone().requires_grad_("x" in wanted)
        with fusedres.use_backend(backend):
            each(leaf).backward(grad)
        grads.append({"x": leaf.grad} | {name: p.grad for name, p in each.named_parameters()})
    for name, value in grads[0].items():
        assert (grads[1][name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(grads[1][name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradcheck_of_an_own_convolution(mode: str, backend: str) -> None:
    """Only parameters need gradients, so that dy is formed on load."""
    off_the_interpreter(backend)
    model, x, _ = stem(torch.float64, NHWC, mode, (7, 6), (1, 3))
    model.conv1 = nn.Conv2d(1, 3, 3, 2, 1, bias=False).double()
    x = x + 0.3 * torch.randn_like(x)  # avoids ties, where no derivative exists
    twin = twin_of(model, "fused")
    before = path_counts.copy()
    with fusedres.use_backend(backend):
        fast = backend == "triton"  # because the interpreter is slow
        assert torch.autograd.gradcheck(lambda *_: twin(x), tuple(twin.parameters()), fast_mode=fast)
    assert path_counts["stem_backward"] > before["stem_backward"]
    assert path_counts["stem_composite_backward"] == before["stem_composite_backward"]


def test_operators_of_an_own_convolution() -> None:
    """There is no library convolution, statistics pass or stored dy; the cpu backend still uses the library."""
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model, "fused").to(memory_format=NHWC)
    with fusedres.use_backend("reference"), Listing() as listing:
        twin(x).backward(grad)
    ours = {name.removeprefix("fusedres::") for name in listing.ran if name.startswith("fusedres::")}
    assert ours == {
        "conv_fprop",
        "bn_finalize",
        "bn_relu_maxpool",
        "bn_relu_maxpool_reduce",
        "bn_backward_coefficients",
        "bn_relu_maxpool_wgrad",
        "conv_wgrad_finalize",
    }
    with fusedres.use_backend("cpu"), Listing() as listing:
        twin(x).backward(grad)
    assert listing.masks == [[False, True, False]]


def test_an_own_convolution_compiles_whole() -> None:
    model, x, grad = stem(memory_format=NHWC)
    with fusedres.use_backend("reference"):
        eager = run_images(copy.deepcopy(model), x, grad)
        got = run_images(torch.compile(twin_of(model, "fused"), fullgraph=True, backend="aot_eager"), x, grad)
    got = {name.replace("_orig_mod.", ""): value for name, value in got.items()}
    check(got, eager, stem_oracle(model, x, grad), torch.float32)
    torch.compiler.reset()


def test_grouped_convolutions_are_the_library_s() -> None:
    model, _, _ = stem(torch.float64)
    model.conv1 = nn.Conv2d(4, 18, 3, 1, 1, bias=False, groups=2).double()
    model.bn1 = nn.BatchNorm2d(18).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with fusedres.use_backend("reference"), Listing() as listing:
        torch.testing.assert_close(twin_of(model, "fused")(x), model(x), rtol=1e-10, atol=1e-11)
    assert "fusedres::conv_fprop" not in listing.ran
