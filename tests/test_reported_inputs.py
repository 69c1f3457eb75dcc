"""After a call that ran unfused because of its input, report() says so and does not call the block fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fusion import expect_paths, stock_case
from shapes import case
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres


class Image(Tensor):
    """A tensor subclass like those of augmentation libraries."""


class Logged(Tensor):
    """A tensor subclass that sees the functions that are called with it."""

    seen: list[str]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("kind", [Image, Logged])
def test_a_tensor_subclass(kind: type) -> None:
    Logged.seen = []
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    twin = fusedres.fuse(copy.deepcopy(model))
    x = torch.randn(2, 3, 32, 32)
    with expect_paths(stem_unfused=1, unfused=4):
        out = twin(x.as_subclass(kind))
    assert type(out) is kind and torch.equal(out.as_subclass(Tensor), model(x))
    assert (kind is Image) == (not Logged.seen)
    rows = fusedres.report(twin)
    assert not any(row.fused for row in rows)
    assert all(f"its last input ran unfused: the input was a {kind.__name__}" in row.reason for row in rows)
    twin(x)
    assert all(row.fused and not row.reason for row in fusedres.report(twin))


def test_other_inputs_that_run_unfused() -> None:
    block, x, _ = stock_case(case("basic", "projection"), mode="eval")
    twin = fusedres.fuse(block)

    def last(call: Any) -> str:
        twin(x)
        assert fusedres.report(twin)[0].fused
        with torch.no_grad():
            call()
        row = fusedres.report(twin)[0]
        assert not row.fused
        return row.reason

    assert "batch was empty" in last(lambda: twin(x[:0]))
    assert "torch.func" in last(lambda: torch.func.vmap(twin)(x[None]))
    assert "forward-mode" in last(lambda: torch.func.jvp(twin, (x,), (x,)) and forward_mode(twin, x))
    assert "torch.jit.trace" in last(lambda: torch.jit.trace(twin, (x,), check_trace=False))
    assert "negated" in last(lambda: twin(torch._neg_view(x)))


def forward_mode(module: nn.Module, x: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        module(torch.autograd.forward_ad.make_dual(x, x))


def test_what_is_kept_for_the_report_is_not_copied_nor_left_behind() -> None:
    block, x, _ = stock_case(case("basic", "projection"))
    before = set(block.__dict__)
    twin = fusedres.fuse(block)
    twin(x.as_subclass(Image))
    assert fusedres.report(copy.deepcopy(twin))[0].fused
    fusedres.unfuse(twin)
    assert set(twin.__dict__) == before
