"""The backend "cuda": what it needs, which backend replaces it and why, and what a failed launch reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_inputs import device

import fusedres
from fusedres import backends, cuda_support, ops
from fusedres.__main__ import as_text, info
from fusedres.kernels import serving
from fusedres.ops._library import OPS
from fusedres.ops.launch import launches
from fusedres.values import Norm


@pytest.fixture
def place() -> Iterator[Any]:
    """Pretend that this build of the kernels and GPUs with these capabilities are here; undone after the test."""
    before = (cuda_support._module, cuda_support._looked, cuda_support.devices)
    patch = pytest.MonkeyPatch()

    def forget() -> None:
        serving.explain.cache_clear()
        for op in OPS.values():
            op._kernels.clear()

    def put(archs: str | None, driver: int = 13000, gpus: tuple[tuple[int, int], ...] = ((9, 0),)) -> None:
        built = SimpleNamespace(build_info=lambda: {"archs": archs, "runtime": 13000}, driver_version=lambda: driver)
        cuda_support.substitute(built if archs else None, ("cuda", "meta"))
        patch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        patch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        patch.setattr(torch.cuda, "get_device_capability", lambda index: gpus[index])
        forget()

    yield put
    patch.undo()
    cuda_support._module, cuda_support._looked, cuda_support.devices = before
    forget()


def test_a_build_without_it_says_what_is_missing(place):
    place(None)
    message = r"use_backend: the cuda backend cannot run here: .*nvcc was not found.*FUSEDRES_BUILD_CUDA=1 pip install"
    with pytest.raises(RuntimeError, match=message), fusedres.use_backend("cuda"):
        pass
    assert backends._current() == "auto"


def test_no_gpu_is_said(place):
    place("9.0a", gpus=())
    with pytest.raises(RuntimeError, match="cannot run here: torch sees no GPU"), fusedres.use_backend("cuda"):
        pass


def test_the_environment_variable_is_checked_when_a_block_runs():
    code = """
import torch, torchvision, fusedres
from fusedres import cuda_support
cuda_support.substitute(None, ("cuda", "meta"))
model = fusedres.fuse(torchvision.models.resnet18())
try:
    model(torch.randn(2, 3, 32, 32))
except RuntimeError as error:
    print(error)
"""
    environment = {**os.environ, "FUSEDRES_BACKEND": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("use_backend: the cuda backend cannot run here: "), done.stderr


@pytest.mark.parametrize(
    ("archs", "capability", "covered"),
    [
        ("8.0", (8, 0), True),
        ("8.0", (8, 6), True),
        ("8.6", (8, 0), False),
        ("8.0;8.9", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("9.0a;9.0+PTX", (12, 0), True),
        ("9.0a+PTX", (12, 0), False),
        ("9.0+PTX", (8, 9), False),
        ("10.0", (12, 0), False),
        ("10.0f", (10, 3), True),
    ],
)
def test_which_devices_a_build_covers(archs, capability, covered):
    assert cuda_support.covers(archs, capability) is covered


def test_a_kernel_of_its_own_serves(place):
    place("9.0a")
    with fusedres.use_backend("cuda"):
        assert backends.backend_for("cuda") == "cuda"
    assert serving.explain("bn_statistics", "bn_finalize", "cuda")[0] == "cuda"


def test_triton_then_the_reference_stand_in(place, monkeypatch):
    place("9.0a")
    assert serving.explain("conv_fprop", "conv_fprop", "cuda") == ("triton", "there is no cuda kernel")
    serving.explain.cache_clear()
    find = serving.find
    monkeypatch.setattr(serving, "find", lambda folder, op, name: None if name == "triton" else find(folder, op, name))
    assert serving.explain("conv_fprop", "conv_fprop", "cuda") == ("reference", "there is no cuda kernel")


@pytest.mark.parametrize(
    ("driver", "gpus", "why"),
    [
        (12080, ((9, 0),), "the driver serves CUDA 12.8, the kernels were built with 13.0; update the driver"),
        (13010, ((9, 0), (7, 5)), "cuda:1 has compute capability 7.5, the kernels were built for 9.0a"),
    ],
)
def test_what_cannot_run_is_a_reason_and_not_an_error(place, driver, gpus, why):
    place("9.0a", driver, gpus)
    with fusedres.use_backend("cuda"):
        assert backends.backend_for("cuda") == "cuda"
    served_by, reason = serving.explain("bn_statistics", "bn_finalize", "cuda")
    assert served_by == "triton" and reason.startswith(why)
    assert OPS["bn_finalize"].kernel("cuda").__module__ == "fusedres.kernels.bn_statistics.triton"


def test_info_shows_what_serves_each_op_and_why(place):
    place("9.0a;9.0+PTX", 12080)
    torch_devices = pytest.MonkeyPatch()
    torch_devices.setattr(torch.cuda, "device_count", lambda: 0)
    torch_devices.setattr(cuda_support, "unsupported", lambda: "the driver serves CUDA 12.8")
    values = info()
    torch_devices.undo()
    assert json.loads(json.dumps(values)) == values
    assert values["cuda"]["built_for"] == "9.0a;9.0+PTX" and values["cuda"]["driver"] == "12.8"
    assert set(values["ops"]) == set(OPS)
    assert values["ops"]["bn_finalize"]["cuda selected"] == {"backend": "triton", "why": "the driver serves CUDA 12.8"}
    assert values["ops"]["bn_relu"]["cpu"]["backend"] == "cpu"
    assert "ops, cuda selected: triton (the driver serves CUDA 12.8)" in as_text(values)


def test_stand_ins_run_and_are_traced():
    """On the host, an op without a CUDA kernel runs Triton's kernel in the interpreter."""
    weight = torch.randn(4, 3, 3, 3, device=device("cuda"))
    assert OPS["conv_weights"].kernel("cuda").__module__ == "fusedres.kernels.conv_weights.triton"
    (got,) = ops.conv_weights([weight], torch.float64, backend="cuda")
    assert torch.equal(got, weight.double())
    (got,) = launches("cuda").conv_weights([weight], torch.float64)
    assert torch.equal(got, weight.double())
    compiled = torch.compile(
        lambda weight: ops.conv_weights([weight], torch.float64, backend="cuda")[0], backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(weight), weight.double())


def test_a_tensor_elsewhere_is_an_error(place):
    place("9.0a")
    statistics = torch.zeros(3, 2, 4), torch.ones(3)
    with pytest.raises(RuntimeError, match="bn_finalize: partials must be on cuda or meta for the cuda backend"):
        ops.bn_finalize(*statistics, Norm(None, None, None, None, None, 0.1, 1e-5), backend="cuda")


def test_a_failed_launch_names_the_op():
    """A GPU refuses a grid without blocks."""
    where = device("cuda")
    empty = torch.zeros((3, 2, 0), device=where), torch.ones(3, device=where)
    with pytest.raises(
        RuntimeError, match=r"bn_finalize: cudaLaunchKernelEx\w* failed: invalid configuration argument"
    ):
        launches("cuda").bn_finalize(*empty, Norm(None, None, None, None, None, 0.1, 1e-5))  # called without the checks


def test_meta_tensors_launch_nothing():
    device("cuda")
    meta = torch.empty((3, 2, 4), device="meta"), torch.empty(3, device="meta")
    got = ops.bn_finalize(*meta, Norm(None, None, None, None, None, 0.1, 1e-5), backend="cuda")
    assert got.shape == (4, 4) and got.is_meta


def test_blocks_run_under_it():
    """A training step on the host under use_backend("cuda") runs CUDA kernels, and Triton's for the other ops."""
    import torchvision

    where = device("cuda")
    model = torchvision.models.resnet18(num_classes=4).double().to(where, memory_format=torch.channels_last)
    block = model.layer1[0]
    x = torch.randn(2, 64, 6, 5, dtype=torch.float64, device=where).to(memory_format=torch.channels_last)
    want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    fusedres.fuse(model)
    with fusedres.use_backend("cuda"):
        got = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
