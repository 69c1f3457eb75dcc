"""Inputs and comparisons that the tests of single ops share. The float64 oracle of each op is in its own test file."""

from __future__ import annotations

from typing import Any

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

import fusedres.ops  # noqa: F401 - defines the ops
from fusedres import cuda_support
from fusedres.kernels import serving
from fusedres.ops._library import OPS

BACKENDS = ("reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (N, C, H, W): one channel, channel counts just off a multiple of 16, one pixel per image, and many rows
SHAPES = (
    (2, 1, 5, 3),
    (3, 3, 4, 4),
    (1, 65, 9, 7),
    (4, 127, 1, 1),
    (2, 129, 5, 5),
    (5, 64, 14, 13),
    (1, 2047, 3, 2),
)
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def backends_of(*names: str) -> tuple[str, ...]:
    """Return the backends that have kernels of their own for all these ops."""
    found = tuple(b for b in BACKENDS if all(serving.find(OPS[name].folder, name, b) is not None for name in names))
    assert "reference" in found
    return found


def device(backend: str, dtype: torch.dtype = torch.float32) -> str:
    """Return the device on which a backend's kernels run here; skip the test if they cannot run here."""
    if backend in ("reference", "cpu"):
        return "cpu"
    if backend == "cuda" and (not torch.cuda.is_available() or cuda_support.unsupported()):
        if cuda_on_cpu.COMPILER is None:
            pytest.skip("the CUDA kernels need a GPU, or g++ to run on the host")
        cuda_on_cpu.install()
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    if dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly, and there is no GPU")
    return "cpu"


def call(name: str, backend: str, **arguments: Any) -> Any:
    """Call an op by the names of its schema's arguments; what is left out is None, or 1 for a number."""
    op = OPS[name]
    schema = getattr(torch.ops.fusedres, name).default._schema
    values = [
        arguments.pop(argument.name, None if str(argument.type).startswith("Optional") else 1)
        for argument in schema.arguments[:-1]
    ]
    assert not arguments, f"{name} has no {', '.join(arguments)}"
    return getattr(torch.ops.fusedres, name)(*values, op.serving(backend))


def activation(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a channels_last activation of normal values, with a mean and scale for each channel."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    channels = shape[1]
    scale = torch.rand(1, channels, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    offset = torch.randn(1, channels, 1, 1, generator=generator, dtype=torch.float64)
    return (values * scale + offset).to(dtype).contiguous(memory_format=torch.channels_last)


def vector(channels: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(channels, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64).to(dtype)


def state(channels: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return (4, C): mean, invstd, scale and shift; all but invstd have both signs."""
    mean, invstd = vector(channels, seed=seed + 10).double(), vector(channels, seed=seed + 11).double().abs() + 0.5
    scale, shift = vector(channels, seed=seed + 12).double(), vector(channels, seed=seed + 13).double()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.stack((mean, invstd, scale, shift)).to(wide)


def channels(v: Tensor) -> Tensor:
    return v.double().view(1, -1, 1, 1)


def assert_near(
    name: str, got: Tensor, want: Tensor, terms: Tensor, dtype: torch.dtype, roundings: float = 4.0
) -> None:
    """Assert |got - want| <= roundings·eps(arithmetic)·terms + the rounding of storage, elementwise, and equal NaNs."""
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, want {tuple(want.shape)}"
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    storage = EPS[got.dtype] * want.abs() + (6e-8 if got.dtype == torch.float16 else 0.0)
    bound = roundings * EPS[wide] * terms + storage
    error = (got.double() - want).abs()
    wrong = ~(error <= bound) & ~(want.isnan() & got.isnan()) & ~(got.double() == want)
    if wrong.any():
        index = torch.unravel_index((error - bound).nan_to_num(1e300).mul(wrong).argmax(), error.shape)
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values wrong, worst at {tuple(int(i) for i in index)}: "
            f"got {got[index].item()}, want {want[index].item()}, allowed error {bound[index].item():.3g}"
        )
