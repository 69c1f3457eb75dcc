"""Random residual blocks against float64, by the rule of tolerance.py: 300 with fixed seeds, more by `pytest --fuzz N`.

A failure prints the smallest failing block that hypothesis found.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from fusion import FORMATS, expect_paths, fused_twin, stock_case
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from reference import oracle, run
from shapes import BLOCKS, EXPANSION, SHORTCUTS, Case
from tolerance import HALF, UNIT, check
from torch import nn

import fusedres

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WAYS = (("cpu", "library"), ("cpu", "library"), ("reference", "library"), ("reference", "fused"))
EXAMPLES = 300


@dataclass(frozen=True)
class Example:
    """A block, its input, and the way it is called."""

    case: Case
    dtype: torch.dtype
    x_format: torch.memory_format
    weight_format: torch.memory_format
    mode: str
    momentum: tuple[float | None, ...]  # for each norm
    memory: str
    backend: str
    conv: str
    wanted: tuple[bool, ...]  # which parameters need a gradient, repeated for all parameters


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw any small shape that a block with this shortcut takes."""
    block, shortcut = draw(st.sampled_from(BLOCKS)), draw(st.sampled_from(SHORTCUTS))
    planes = draw(st.integers(1, 20) | st.sampled_from((31, 32, 33, 64)))
    out_channels = planes * EXPANSION[block]
    in_channels, stride = out_channels, 1
    if shortcut != "identity":
        stride = draw(st.integers(1, 3))
        in_channels = draw(st.integers(1, out_channels if shortcut == "zeropad" else 40))
    sizes = [draw(st.integers(1, 9)) for _ in range(2)]
    case = Case(
        block, shortcut, in_channels, planes, stride, draw(st.integers(1, 5)), *sizes, draw(st.integers(0, 999))
    )
    # Any two values per channel normalise to 1 and -1, so that gradients contain only rounding.
    assume(case.values_a_channel > 2)
    return case


@st.composite
def examples(draw: st.DrawFn) -> Example:
    case = draw(cases())
    backend, conv = draw(st.sampled_from(WAYS))
    frozen = st.lists(st.sampled_from(case.norms), min_size=1, unique=True).map(
        lambda names: f"frozen:{','.join(names)}"
    )
    wanted = draw(st.lists(st.booleans(), min_size=1, max_size=5).filter(any))
    return Example(
        case,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(FORMATS)),
        draw(st.sampled_from(("train", "train", "eval", "frozen")) | frozen),
        tuple(draw(st.sampled_from((0.1, 0.1, 1.0, 0.0, None))) for _ in case.norms),
        draw(st.sampled_from(("auto", "min"))),
        backend,
        conv,
        (True,) if draw(st.booleans()) else tuple(wanted),
    )


def compare(example: Example) -> None:
    """Assert the rule for the fused block, except where rounding decides a ReLU's mask."""
    case, dtype = example.case, example.dtype
    block, x, grad = stock_case(case, dtype, example.x_format, example.mode)
    block = block.to(memory_format=example.weight_format)
    for name, momentum in zip(case.norms, example.momentum, strict=True):
        norm = block.get_submodule(name)
        assert isinstance(norm, nn.BatchNorm2d)
        norm.momentum = momentum
    truth = oracle(block, x, grad, UNIT[dtype])
    if truth.unsure is not None:
        grad = grad.masked_fill(truth.unsure, 0)
        truth = oracle(block, x, grad, UNIT[dtype])
    assume(truth.at_risk <= (0.02 * truth.activations if dtype in HALF else 0))
    wanted = {name: example.wanted[i % len(example.wanted)] for i, (name, _) in enumerate(block.named_parameters())}
    eager = run(copy.deepcopy(block), x, grad)
    twin = fused_twin(block, example.memory, example.conv)
    with fusedres.use_backend(example.backend), expect_paths(fused_forward=1, fused_backward=1):
        got = run(twin, x, grad)
    check(got, eager, truth, dtype, example)
    assert got["out"].stride() == eager["out"].stride(), "strides"
    # If only some gradients are wanted, they equal the same gradients of a full backward.
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(wanted[name])
        norm = twin.get_submodule(name.rpartition(".")[0])
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats = False if norm.training else norm.track_running_stats
    with fusedres.use_backend(example.backend):
        some = run(twin, x, grad)
    assert {name for name in some if name.startswith("grad.")} == {f"grad.{n}" for n, asked in wanted.items() if asked}
    partial = {name: value for name, value in some.items() if name.startswith("grad")}
    check(partial, {name: eager[name] for name in partial}, truth, dtype, example)


def test_random_blocks(request: pytest.FixtureRequest) -> None:
    more = request.config.getoption("--fuzz")

    @settings(
        max_examples=more or EXAMPLES,
        derandomize=more is None,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples())
    def keeps_the_rule(example: Example) -> None:
        compare(example)

    keeps_the_rule()
