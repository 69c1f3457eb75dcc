"""memory="min" in 16 bits on a CPU: the convolutions that end a branch run again in backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion import FORMATS, expect_paths, fused_twin, label, stock_case
from reference import run
from shapes import Case
from test_memory import saved_bytes
from test_native_passes import ONE_PASS
from torch import Tensor, nn

from fusedres.autograd import cpu_passes
from fusedres.modules.fused_block import plan_of

HALF = (torch.bfloat16, torch.float16)


def in_both(block: nn.Module, function: Callable[[nn.Module], Any]) -> tuple[Any, Any]:
    """Return what a function finds with memory="auto" and with memory="min"."""
    return tuple(function(fused_twin(block, memory=memory)) for memory in ("auto", "min"))


@pytest.mark.parametrize("python", [False, True], ids=["C++", "Python"])
@pytest.mark.parametrize("wide_norms", [False, True], ids=["16-bit norms", "float32 norms"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("case", ONE_PASS, ids=label)
def test_it_equals_auto_bit_by_bit_and_saves_less(
    case: Case,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    wide_norms: bool,
    python: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block, x, grad = stock_case(case, dtype, memory_format)
    if wide_norms:
        for module in block.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.float()
    if python:
        monkeypatch.setattr(cpu_passes, "_serves", lambda x, plan: False)
    with expect_paths(fused_forward=2, fused_backward=2):
        auto, least = in_both(block, lambda twin: run(twin, x, grad))
    assert auto.keys() == least.keys()
    for name, value in auto.items():
        assert torch.equal(least[name], value) and least[name].stride() == value.stride(), name
    auto, least = in_both(block, lambda twin: saved_bytes(twin, x.clone()))
    ends = 1 if case.block == "basic" or case.in_channels == 24 or case.shortcut == "identity" else 2
    assert least == auto - ends * grad.numel() * grad.element_size()


@pytest.mark.parametrize("wide_norms", [False, True])
def test_a_kept_graph_gives_the_same_again(wide_norms: bool) -> None:
    block, x, grad = stock_case(ONE_PASS[2], torch.bfloat16)
    twin = fused_twin(block, memory="min")
    if wide_norms:
        for norm in (twin.bn1, twin.bn2, twin.bn3, twin.downsample[1]):
            norm.float()
    out, wanted = twin(x.requires_grad_()), [x, *twin.parameters()]
    first, second = (torch.autograd.grad(out, wanted, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast() -> None:
    block, x, grad = stock_case(ONE_PASS[2])

    def step(twin: nn.Module) -> list[Tensor]:
        source = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = twin(source)
        with torch.autocast("cpu", torch.float16):  # what backward runs under does not matter
            return list(torch.autograd.grad(out, [source, *twin.parameters()], grad.to(out.dtype)))

    auto, least = in_both(block, step)
    assert all(torch.equal(a, b) for a, b in zip(auto, least, strict=True))


def test_a_second_derivative_and_one_parameter_alone() -> None:
    block, x, grad = stock_case(ONE_PASS[1], torch.bfloat16)

    def of(twin: nn.Module) -> list[Tensor]:
        source = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(twin(source), source, grad, create_graph=True)
        alone = torch.autograd.grad(copy.deepcopy(twin)(x).square().sum(), twin.bn3.bias, allow_unused=True)
        (only,) = torch.autograd.grad(twin(x).square().sum(), twin.conv1.weight)
        assert alone == (None,)
        return [first, *torch.autograd.grad(first.square().sum(), source), only]

    auto, least = in_both(block, of)
    assert all(torch.equal(a, b) for a, b in zip(auto, least, strict=True))


def test_float32_and_other_backends_compute_the_statistics_first() -> None:
    for dtype, backend, recompute in (
        (torch.bfloat16, "cpu", (True, True)),
        (torch.float32, "cpu", (False, False)),
        (torch.bfloat16, "reference", (False, False)),
    ):
        block, x, _ = stock_case(ONE_PASS[2], dtype)
        twin = fused_twin(block, memory="min")
        plan, _ = plan_of(twin, x, backend)
        assert plan.recompute == recompute and plan.one_pass == (not recompute[0], not recompute[1])
