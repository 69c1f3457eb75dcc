"""Find out at run time whether torch's own convolutions are right on this CPU: some of them may be wrong.

In some bfloat16 convolutions of tiny images, oneDNN reads memory that was never written: in the weight gradient of a
strided 3x3 convolution over 1x1 images (oneDNN 3.13.3), and in others on CPUs with AMX. The result of eager is then NaN
or wrong at random, and so is every result that uses the same convolution. Comparing with eager means nothing there.

`trust(model, x)` runs a stock model once to list its convolutions. Then `probe` runs each of them, forward and
backward, on tensors of its own. It fills free memory, the buffers that the library keeps and the memory around each
operand with NaN, and then with large values. The results must repeat bit by bit and be within rounding of float64:

    |got - oracle| <= 8·u·sum |terms|,    u the unit roundoff of the dtype.

Sound convolutions need less than 3 instead of 8. If one is not sound, oneDNN is turned off for the rest of the test:
both sides then call torch's other convolutions, and the test still judges everything else. If those are not sound
either, the test is skipped. In both cases the reason is shown, in a warning or in the reason of the skip.

Nothing of the tested package is imported or called here, so that none of its faults can pass for a fault of torch.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import pytest
import torch
from tolerance import HALF, UNIT
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDINGS = 8.0
# A buffer full of the first byte is NaN in every floating-point dtype; full of the second, it is above 6e4 in each.
POISON = (0xFF, 0x7B)
GUARD = 4096  # bytes before and after an operand
Sizes = tuple[int, ...]


class Convolution(NamedTuple):
    """The arguments of one torch convolution, and the strides of its input, weight and output."""

    dtype: torch.dtype
    x: Sizes
    weight: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    layouts: tuple[Sizes, Sizes, Sizes]

    def __str__(self) -> str:
        names = [_layout(size, strides) for size, strides in zip((self.x, self.weight), self.layouts, strict=False)]
        return (
            f"{_by(self.x)} ({names[0]}) and {_by(self.weight)} ({names[1]}), stride {_by(self.stride)}, "
            f"padding {_by(self.padding)}, dilation {_by(self.dilation)}, {self.groups} groups"
        )

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(self, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.stride, self.padding, self.dilation, False, (0, 0), self.groups, (True, True, False)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *settings)[:2]


def _by(sizes: Sizes) -> str:
    return "x".join(map(str, sizes))


def _layout(size: Sizes, strides: Sizes) -> str:
    of = torch.empty(size, device="meta").as_strided(size, strides)
    names = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    return " or ".join(name for name, layout in names.items() if of.is_contiguous(memory_format=layout)) or "strided"


# --- the convolutions that a model runs


def _in_question(x: Tensor) -> bool:
    """Skip float64, which is its own oracle, and large float32 convolutions: slow to probe, and no fault is known."""
    return x.dtype in HALF or (x.dtype == torch.float32 and x.numel() <= 2**16)


class _Listing(TorchDispatchMode):
    """Collect the convolutions that run while the mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[Convolution] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.convolution.default and not args[6]:
            self._add(out, args[0], args[1], args[3:6], args[8])
        elif function is torch.ops.aten.convolution_backward.default and not args[7]:
            self._add(args[0], args[1], args[2], args[4:7], args[9])
        return out

    def _add(self, out: Tensor, x: Tensor, weight: Tensor, settings: Iterable[list[int]], groups: int) -> None:
        if x.dim() != 4 or not out.numel() or not _in_question(x):
            return
        sizes = tuple(x.shape), tuple(weight.shape), *(tuple(each) for each in settings), groups
        uniform = (
            tuple(torch.empty(t.shape, device="meta", memory_format=layout).stride() for t in (x, weight, out))
            for layout in (torch.contiguous_format, torch.channels_last)
        )
        given = (x, weight, out)
        dense = all(t.stride() == torch.empty_like(t, device="meta").stride() for t in given)
        for layouts in (*([tuple(t.stride() for t in given)] if dense else []), *uniform):
            self.found.add(Convolution(x.dtype, *sizes, layouts))  # type: ignore[arg-type]


def convolutions(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> frozenset[Convolution]:
    """Return the convolutions of one training step of a stock model, also with all tensors in NCHW and in NHWC."""
    model, x = copy.deepcopy(model), x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    # Not by oneDNN, which may crash.
    with _Listing() as listing, torch.backends.mkldnn.flags(enabled=False):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            out = model(x)
        out.backward(torch.ones_like(out))
    return frozenset(listing.found)


# --- are these convolutions sound?


def _poison(byte: int) -> None:
    """Fill free memory with this byte, so that the next allocations, small and large, contain it."""
    torch.empty(2**20, dtype=torch.uint8).fill_(byte)
    kept = [torch.empty(2**power, dtype=torch.uint8).fill_(byte) for power in range(6, 18) for _ in range(8)]
    del kept[:]


def _filled(convolution: Convolution, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return input, weight and gradient of the output: normal values in the convolution's layouts."""
    generator = torch.Generator().manual_seed(seed)
    shape = convolution.forward(
        torch.empty(convolution.x, device="meta"), torch.empty(convolution.weight, device="meta")
    ).shape
    made = []
    for size, strides in zip((convolution.x, convolution.weight, shape), convolution.layouts, strict=True):
        values = torch.empty_strided(size, strides, dtype=convolution.dtype)
        made.append(values.copy_(torch.randn(size, generator=generator)))
    return made[0], made[1], made[2]


def _guarded(values: Tensor, byte: int) -> Tensor:
    """Return a copy with that byte before and after it, which a kernel finds when it reads beyond an operand."""
    size = values.numel() * values.element_size()
    whole = torch.empty(size + 2 * GUARD, dtype=torch.uint8).fill_(byte)
    part = (
        whole[GUARD : GUARD + size]
        .view(values.dtype)
        .as_strided(values.shape, values.stride(), GUARD // values.element_size())
    )
    return part.copy_(values)


def _forward(convolution: Convolution, x: Tensor, weight: Tensor, _: Tensor) -> dict[str, Tensor]:
    return {"convolution": convolution.forward(x, weight)}


def _backward(convolution: Convolution, x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    grad_x, grad_weight = convolution.backward(grad, x, weight)
    return {"input gradient of the convolution": grad_x, "weight gradient of the convolution": grad_weight}


@cache
def probe(convolution: Convolution, onednn: bool, threads: int) -> str | None:
    """Say what is wrong with torch's convolution or its gradients; None if nothing is. The settings must be in use."""
    assert onednn == torch.backends.mkldnn.enabled and threads == torch.get_num_threads()
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for direction in (_forward, _backward):
            found = _probe(convolution, direction)
            if found is not None:
                return found
    return None


def _probe(convolution: Convolution, direction: Callable[..., dict[str, Tensor]]) -> str | None:
    given = _filled(convolution, 0)
    exact = direction(convolution, *(v.double() for v in given))
    terms = direction(convolution, *(v.double().abs() for v in given))
    first: dict[str, Tensor] = {}
    for byte in POISON:
        direction(convolution, *(torch.full_like(v, _value(byte, v.dtype)) for v in given))  # the library's buffers
        guarded = [_guarded(v, byte) for v in given]
        _poison(byte)
        got = direction(convolution, *guarded)
        for name, value in got.items():
            wrong = _wrong(value, exact[name], terms[name], first.get(name, value))
            if wrong is not None:
                dtype = str(value.dtype).removeprefix("torch.")
                return f"torch's {dtype} {name} of {convolution} is wrong on this CPU: {wrong}"
        first = first or got
    return None


def _value(byte: int, dtype: torch.dtype) -> float:
    return torch.full((dtype.itemsize,), byte, dtype=torch.uint8).view(dtype).item()


def _wrong(got: Tensor, exact: Tensor, terms: Tensor, first: Tensor) -> str | None:
    if not got.isfinite().all():
        return f"{int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    allowed = ROUNDINGS * UNIT[got.dtype] * terms + torch.finfo(got.dtype).smallest_normal
    error = (got.double() - exact).abs()
    if not (error <= allowed).all():
        return f"an error of {(error / allowed).max().item():.2g} times what rounding explains"
    return None if torch.equal(got, first) else "two runs over the same numbers differ"


_CRASH = """
import torch
torch.set_num_threads(1)
for channels in (4, 8, 16):
    x = torch.randn(4, channels, 40, 40).to(memory_format=torch.channels_last)
    weight = torch.randn(2 * channels, channels, 1, 1).to(memory_format=torch.channels_last)
    grad = torch.ones_like(torch.nn.functional.conv2d(x, weight, stride=2))
    settings = None, (2, 2), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False)
    for _ in range(20):
        torch.ops.aten.convolution_backward(grad, x, weight, *settings)
"""


@cache
def strided_pixelwise_crash() -> bool:
    """Whether torch crashes in the weight gradient of a strided 1x1 convolution; found out in another process.

    On some CPUs with AVX2 alone, oneDNN's kernel for it (torch 2.14.1, channels_last) ends in a bus error, or never.
    """
    try:
        done = subprocess.run([sys.executable, "-c", _CRASH], capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def require_no_crash() -> None:
    """Skip a test that needs torch's strided 1x1 convolutions as they are."""
    if strided_pixelwise_crash():
        pytest.skip("torch's weight gradient of a strided 1x1 convolution crashes on this CPU")


def _may_crash(convolution: Convolution) -> bool:
    pixelwise = convolution.weight[2:] == (1, 1) and convolution.stride != (1, 1)
    return pixelwise and convolution.dtype == torch.float32


def _reads_unwritten_memory(convolution: Convolution) -> bool:
    """Whether oneDNN's weight gradient is known to, which `probe` sees in most runs and not in all."""
    strided = convolution.weight[2:] != (1, 1) and convolution.stride != (1, 1)
    return strided and convolution.x[2:] == (1, 1) and convolution.dtype == torch.bfloat16


def fault(made: Iterable[Convolution]) -> str | None:
    """Say what is wrong with the first of these convolutions that is not sound; None if all are sound."""
    settings = torch.backends.mkldnn.enabled, torch.get_num_threads()
    made = list(made)
    if torch.backends.mkldnn.enabled and any(map(_reads_unwritten_memory, made)):
        return (
            "torch's bfloat16 weight gradient of a strided convolution of 1x1 images reads memory that was not written"
        )
    if torch.backends.mkldnn.enabled and any(map(_may_crash, made)) and strided_pixelwise_crash():
        return "torch's weight gradient of a strided 1x1 convolution crashes on this CPU"
    return next((found for each in sorted(made, key=str) if (found := probe(each, *settings))), None)


@contextmanager
def trusted(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Apply `trust` to the code inside only: for loops over models within one test."""
    before = torch.backends.mkldnn.enabled
    try:
        trust(model, x)
        yield
    finally:
        torch.backends.mkldnn.enabled = before


def trust(model: nn.Module, x: Tensor, autocast: torch.dtype | None = None) -> None:
    """Call `trust_all` for the convolutions of a stock model."""
    trust_all(convolutions(model, x, autocast))


def trust_all(made: Iterable[Convolution]) -> None:
    """Make sure that the rest of the test uses sound convolutions: turn oneDNN off if it is wrong, else skip the test.

    The fixture of every test in conftest.py turns oneDNN on again.
    """
    found = fault(made)
    if found is None:
        return
    if torch.backends.mkldnn.enabled:
        torch.backends.mkldnn.enabled = False
        warnings.warn(f"{found}; judged without oneDNN", stacklevel=3)
        found = fault(made)
    if found is not None:
        pytest.skip(found)
