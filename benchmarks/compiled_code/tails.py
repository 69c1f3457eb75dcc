"""The gated residual tails of the family, and a layer of a dense block, on meta tensors, as blocks call them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedres.ops.launch import launches
from fusedres.values import (
    Activation,
    BnBranch,
    Gated,
    Norm,
    TailCoefficients,
    TailNeeds,
    TailTerm,
    arithmetic_dtype,
    mask_shape,
)

CHANNELS, SIZE = 256, 28  # of ResNet-50's second stage


def _tensor(*shape: int, dtype: torch.dtype) -> Tensor:
    made = torch.empty(shape, device="meta", dtype=dtype)
    return made.to(memory_format=torch.channels_last) if len(shape) == 4 else made


def _step(branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool, masked: bool) -> None:
    launch, x = launches("triton"), branch.x
    launch.gated_tail(branch, shortcut, activation, coupled, masked)
    mask = torch.empty(mask_shape(x), dtype=torch.uint8, device="meta") if masked else None
    gated, tail = Gated(torch.empty_like(x), mask), (branch, shortcut, activation, coupled)
    launch.gated_tail_reduce(gated, *tail, activation.slope is not None)
    coefficients = TailCoefficients(
        *(None if t is None or t.state is None else t.state[None] for t in (branch, shortcut))
    )
    needs = TailNeeds(True, shortcut is not None, branch.logits is not None)
    launch.gated_tail_apply(gated, *tail, coefficients, needs)


def _dense_layer(batch: int, dtype: torch.dtype) -> None:
    """Launch what a layer of a dense block does, but for its convolutions."""
    launch, width, reads = launches("triton"), 640, 512
    buffer = _tensor(batch, width, SIZE, SIZE, dtype=dtype)
    moments, state = _tensor(width, 2, dtype=torch.float64), _tensor(4, reads, dtype=arithmetic_dtype(dtype))
    launch.dense_append_(buffer, _tensor(batch, width - reads, SIZE, SIZE, dtype=dtype), reads, moments)
    launch.bn_from_moments(moments[:reads], batch * SIZE**2, Norm(None, None, None, None, None, 0.1, 1e-5), dtype)
    h = launch.dense_bn_relu(buffer, state)
    launch.dense_bn_relu_backward_(h, BnBranch(buffer, state, True), torch.empty_like(buffer), moments)
    for corrections in (moments, None):
        launch.dense_gradient(buffer, buffer, corrections, corrections, reads, width - reads)


def steps(batch: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """Return name → a function that launches the passes of a tail, or of a dense layer, forward and backward."""
    wide = arithmetic_dtype(dtype)

    def x() -> Tensor:
        return _tensor(batch, CHANNELS, SIZE, SIZE, dtype=dtype)

    def vectors(rows: int) -> Tensor:
        return _tensor(rows, CHANNELS, dtype=wide)

    slope = _tensor(CHANNELS, dtype=wide)
    tails = {
        "highway": (TailTerm(x(), None, None, x()), TailTerm(x()), Activation("relu", None, True), True, False),
        "squeeze-and-excitation": (
            TailTerm(x(), vectors(4), vectors(batch)), TailTerm(x()), Activation("relu"), False, True,
        ),
        "SiLU": (TailTerm(x(), vectors(4)), None, Activation("silu", None, True), False, False),
        "PReLU": (
            TailTerm(x(), vectors(4)), TailTerm(x(), vectors(4)), Activation("leaky_relu", slope), False, False,
        ),
        "two gates, GELU": (
            TailTerm(x(), vectors(4), None, x()), TailTerm(x(), vectors(4), None, x()), Activation("gelu"), False,
            False,
        ),
    }  # fmt: skip
    found: dict[str, Callable[[], None]] = {f"tail of {n}": lambda tail=tail: _step(*tail) for n, tail in tails.items()}
    return found | {"dense layer": lambda: _dense_layer(batch, dtype)}
