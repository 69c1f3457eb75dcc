"""The checks of ops on a device (fusedres/tune/compare.py): right results pass, one wrong element does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fusion import FORMATS
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

import fusedres
from fusedres.ops._library import OPS
from fusedres.tune.calls import Call, Visit
from fusedres.tune.compare import Expected, ExpectedOutput, off_by, repeats, wide_output

NHWC = torch.channels_last
assert NHWC in FORMATS


def block(kind: str) -> tuple[nn.Module, int]:
    """Return a block and the number of its input channels."""
    down = nn.Sequential(conv1x1(16, 64, 2), nn.BatchNorm2d(64))
    return {
        "bottleneck": (Bottleneck(64, 16), 64),
        "projection": (Bottleneck(16, 16, 2, down), 16),
        "basic": (BasicBlock(32, 32), 32),
    }[kind]


def calls(kind: str, memory: str, dtype: torch.dtype, check: Callable[[Call], None]) -> None:
    """Call `check` with each op of a training step and of inference on the CPU."""
    torch.manual_seed(0)
    module, channels = block(kind)
    module = fusedres.fuse(module.to(memory_format=NHWC), memory=memory)
    x = torch.randn(4, channels, 14, 14).to(memory_format=NHWC).requires_grad_()
    around = torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)
    with fusedres.use_backend("cpu"), Visit(set(), check):
        with around:
            out = module(x)
        out.backward(torch.randn_like(out))
        with around, torch.no_grad():
            module.eval()(x)


def seeded(right: Tensor, at: int, kind: str) -> Tensor:
    """Return a copy with one wrong element: off by half a deviation, not finite, or another integer."""
    wrong = right.clone()
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(at % right.numel()), right.shape))
    if not right.is_floating_point():
        wrong[where] ^= 1
    elif kind == "value":
        wrong[where] += 0.5 * right.double().std(correction=0).clamp(min=1e-3).to(right.dtype)
    else:
        wrong[where] = float(kind)
    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "memory"), [("bottleneck", "min"), ("projection", "min"), ("basic", "auto")])
def test_right_results_pass_and_one_wrong_element_does_not(kind: str, memory: str, dtype: torch.dtype) -> None:
    checked: dict[str, int] = {}

    def check(call: Call) -> None:
        expected, ours = Expected(call), call.results("cpu")
        assert expected.wrong(ours) is None, call.signature
        assert repeats(call, "cpu", 2) is None
        for position, right in enumerate(ours):
            for what in ("value", "nan", "inf") if right.numel() else ():
                wrong = [*ours[:position], seeded(right, 7919, what), *ours[position + 1 :]]
                told = expected.wrong(wrong)
                assert told is not None and told.startswith(f"result {position} has "), (call.signature, what)
            checked[call.op.name] = max(checked.get(call.op.name, 0), right.numel())

    calls(kind, memory, dtype, check)
    assert len(checked) >= 8 and max(checked.values()) >= 10_000


def test_what_a_norm_does_not_see() -> None:
    """One of more than 10,000 elements is wrong, but no larger than the others."""
    seen: list[str] = []

    def check(call: Call) -> None:
        if call.op.name == "bn_add_relu":
            right, *rest = call.results("cpu")
            wrong = seeded(right, 7919, "value")
            assert right.numel() > 10_000 and off_by(wrong, right) < 0.01
            seen.append(Expected(call).wrong([wrong, *rest]) or "")

    calls("basic", "auto", torch.bfloat16, check)
    assert len(seen) >= 1 and all("has 1 of 25,088 elements off by more than" in told for told in seen)


def test_the_error_of_a_mean_near_zero_is_that_of_the_values_that_cancel_in_it() -> None:
    x = torch.randn(2, 1, 8, 8).to(memory_format=NHWC)
    x -= x.double().mean().float()
    running = torch.zeros(1), torch.ones(1), torch.tensor(0)
    call = Call(OPS["bn_statistics"], (x, None, None, *running, 0.1, 1e-5, "cpu"))
    expected, (state, mean, *rest) = Expected(call), call.results("cpu")
    assert mean.abs() < 1e-7
    assert expected.wrong([state, mean + 0.4 * 2.0**-24, *rest]) is None
    assert "result 1 has 1 of 1 elements" in str(expected.wrong([state, mean + 1e-5, *rest]))


def test_infinite_and_nan_values_do_not_excuse_others() -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=NHWC)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = torch.inf, torch.nan
    state = torch.stack([torch.zeros(3), torch.ones(3), torch.ones(3), torch.zeros(3)])
    call = Call(OPS["bn_relu"], (x, state, None, 1, "cpu"))
    expected, (right,) = Expected(call), call.results("cpu")
    assert expected.wrong([right]) is None
    assert str(expected.wrong([seeded(right, 2, "value")])).startswith("result 0 has 1 of 384 elements")


def stub(results: Callable[[], Any]) -> Call:
    """Return a call of an op without arguments."""
    op: Any = SimpleNamespace(
        name="stub", arguments=("backend",), written=(), kernel=lambda backend: results, grouped=list
    )
    return Call(op, ("cpu",))


def test_bits_that_change_from_call_to_call_are_told() -> None:
    values = torch.randn(1000)
    assert repeats(stub(lambda: (values.clone(), values.to(torch.uint8))), "cpu", 20) is None
    assert repeats(stub(lambda: torch.full((3,), torch.nan)), "cpu", 3) is None
    count = iter(range(100))

    def last_bit() -> Tensor:
        changed = values.clone()
        changed[17] += 1e-7 * (next(count) == 19)
        return changed

    assert repeats(stub(last_bit), "cpu", 20) == "result 0 has 1 of 1,000 elements that differ from call to call"
    assert repeats(stub(lambda: torch.zeros(3) * (-1) ** next(count)), "cpu", 2) is not None  # -0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocks_output_with_one_wrong_pixel_is_told(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = BasicBlock(32, 32).to(memory_format=NHWC)
    x = torch.randn(4, 32, 14, 14).to(memory_format=NHWC)
    around = torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16)
    before = copy.deepcopy(module.state_dict())
    expected = ExpectedOutput(_run(module, x, around), wide_output(module, x), dtype, False)
    fused = fusedres.fuse(copy.deepcopy(module))
    ours = _run(fused, x, around)
    assert expected.wrong(ours) is None
    for what in ("value", "nan"):
        assert "of 25,088 elements off by more than" in str(expected.wrong(seeded(ours, 7919, what)))
    assert "has shape" in str(expected.wrong(ours[:2]))
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if "running" not in name)


def _run(module: nn.Module, x: Tensor, around: Any) -> Tensor:
    with around, torch.no_grad():
        return copy.deepcopy(module)(x)
