"""A fused block that was changed after a call does what the stock block does: it uses nothing stale."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fusion import expect_paths, fused_twin, stock_case
from shapes import Case, case
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fusedres
from fusedres.modules import fused_block
from fusedres.modules.fused_block import plan_of

SMALL = case("basic", "projection")
Change = Callable[[nn.Module], object]


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def data(name: str, make: Callable[[Tensor], Tensor]) -> Change:
    """Replace the values of a parameter or buffer; the object stays the same."""

    def change(block: nn.Module) -> None:
        tensor = dict([*block.named_parameters(), *block.named_buffers()])[name]
        tensor.data = make(tensor.data)

    return change


def attribute(owner: str, name: str, value: Any) -> Change:
    return lambda block: setattr(block.get_submodule(owner), name, value(block) if callable(value) else value)


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor + 1], -1)[..., 0]


def freed(tensor: Tensor) -> Tensor:
    found = tensor.clone()
    found.untyped_storage().resize_(0)
    return found


def in_place(block: nn.Module) -> None:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(1.5)
        block.bn1.running_mean.add_(0.5)


CHANGES: dict[str, Change] = {
    "nothing": lambda _: None,
    "values in place": in_place,
    "values by .data": data("conv2.weight", lambda t: t * 2),
    "strided norm": data("bn1.weight", strided),
    "strided statistics": data("bn2.running_var", strided),
    "negated norm": data("bn2.bias", torch._neg_view),
    "negated weight": data("conv1.weight", torch._neg_view),
    "zero norm": data("bn1.bias", lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype)),
    "weight of more channels": data("conv2.weight", lambda t: torch.cat([t, t])),
    "weight of fewer inputs": data("conv2.weight", lambda t: t[:, 1:].clone()),
    "weight of another kernel": data("conv1.weight", lambda t: t[:, :, :1, :1].clone()),
    "weight of another dtype": data("conv1.weight", lambda t: t.float()),
    "norm of another dtype": data("bn1.weight", lambda t: t.float()),
    "norm of another width": data("downsample.1.bias", lambda t: t[:-1].clone()),
    "projection of another kernel": data("downsample.0.weight", lambda t: t.repeat(1, 1, 2, 2)),
    "weights in channels_last": lambda b: b.to(memory_format=torch.channels_last),
    "a function for a shortcut": lambda b: b.__dict__.update(downsample=lambda x: x.mean()),
    "an attribute for a child": lambda b: b.__dict__.update(relu=nn.functional.gelu),
    "an attribute for a weight": lambda b: b.conv1.__dict__.update(weight=b.conv1.weight.detach() * 3),
    "three dimensions": data("conv1.weight", lambda t: t[0]),
    "freed weight": data("conv2.weight", freed),
    "freed statistics": data("bn1.running_mean", freed),
    "another parameter": attribute("conv1", "weight", lambda b: nn.Parameter(b.conv1.weight.detach() + 1)),
    "another buffer": attribute("bn1", "running_var", lambda b: b.bn1.running_var + 1),
    "no buffer": attribute("bn1", "running_mean", None),
    "a float counter": attribute("bn1", "num_batches_tracked", lambda _: torch.tensor(3.0)),
    "stride": attribute("conv2", "stride", (2, 2)),
    "stride by a number": attribute("conv2", "stride", 1),
    "padding": attribute("conv2", "padding", (2, 2)),
    "groups": attribute("conv2", "groups", 2),
    "momentum": attribute("bn2", "momentum", 0.7),
    "no momentum": attribute("bn2", "momentum", None),
    "eps": attribute("bn2", "eps", 0.3),
    "one norm in eval": lambda b: b.bn2.eval(),
    "other mode": lambda b: b.train(not b.training),
    "no statistics kept": attribute("bn1", "track_running_stats", False),
    "a hook": lambda b: b.bn1.register_forward_hook(lambda _, __, out: out + 1),
    "a hook on the shortcut": lambda b: b.downsample[0].register_forward_pre_hook(lambda _, a: (a[0] * 2,)),
    "a method": attribute("bn2", "forward", lambda b: lambda x: nn.BatchNorm2d.forward(b.bn2, x) - 1),
    "a class": attribute("bn1", "__class__", lambda _: Doubled),
    "another norm": attribute("", "bn1", lambda b: copy.deepcopy(b.bn2)),
    "another activation": attribute("", "relu", lambda _: nn.LeakyReLU(0.5)),
    "no shortcut": attribute("", "downsample", None),
    "another shortcut": attribute("", "downsample", lambda b: nn.Sequential(b.downsample[0], nn.Identity())),
    "zero padding": attribute("", "downsample", lambda b: fusedres.ZeroPadShortcut(4, 8, 2)),
    "a bias": attribute("conv1", "bias", lambda b: nn.Parameter(torch.ones_like(b.bn1.bias))),
    "the block's own forward": attribute("", "forward", lambda b: lambda x: BasicBlock.forward(b, x) * 3),
}


def outcome(block: nn.Module, x: Tensor, recorded: bool) -> Any:
    """Return output, gradients and buffers, or the error class of torch that was raised."""
    block.zero_grad(set_to_none=True)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(recorded)
    try:
        with nullcontext() if recorded else torch.no_grad():
            out = block(leaf)
            if recorded:
                out.square().sum().backward()
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        kinds = (RuntimeError, ValueError, TypeError, AttributeError)
        return next(kind for kind in kinds if isinstance(error, kind))
    grads = {name: p.grad for name, p in block.named_parameters()}
    stats = {name: b.clone() for name, b in block.named_buffers() if b.untyped_storage().nbytes()}
    return {"out": out.detach(), "x": leaf.grad} | grads | stats


# Here torch reads freed memory or beyond a tensor, so that there is nothing to compare with.
UNDEFINED = ("freed weight", "freed statistics", "norm of another width")


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", CHANGES)
def test_what_was_changed_counts(what: str, mode: str, recorded: bool) -> None:
    block, x, _ = stock_case(SMALL, torch.float64, torch.channels_last, mode)
    twin = fusedres.fuse(copy.deepcopy(block))
    for model in (block, twin):
        for _ in range(2):
            outcome(model, x, recorded)
    for model in (block, twin):
        CHANGES[what](model)
    if what in UNDEFINED:
        with pytest.raises(RuntimeError):
            twin(x.requires_grad_(recorded))
        return
    expected, got = outcome(block, x, recorded), outcome(twin, x, recorded)
    if isinstance(expected, type):
        assert got is expected
        return
    if (what, mode, recorded) == ("strided statistics", "eval", True):
        expected = {"out": expected["out"]}  # torch 2.14 reads beyond strided statistics in the gradients
    assert not isinstance(got, type), got
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
        else:
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=name)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "larger": lambda x: torch.cat([x, x], 2).contiguous(memory_format=torch.channels_last),
    "more images": lambda x: torch.cat([x, x]).contiguous(memory_format=torch.channels_last),
    "contiguous": lambda x: x.contiguous(),
    "negated": torch._neg_view,
    "strided": lambda x: torch.cat([x, x], 3)[..., ::2],
    "float32": lambda x: x.float(),
    "one channel more": lambda x: torch.cat([x, x[:, :1]], 1),
    "three dimensions": lambda x: x[0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("what", INPUTS)
def test_another_input(what: str) -> None:
    block, x, _ = stock_case(SMALL, torch.float64, torch.channels_last, "eval")
    twin = fusedres.fuse(copy.deepcopy(block))
    outcome(twin, x, False)
    other = INPUTS[what](x)
    expected, got = outcome(block, other, False), outcome(twin, other, False)
    if isinstance(expected, type):
        assert got in (expected, RuntimeError)
    else:
        torch.testing.assert_close(got["out"], expected["out"], rtol=1e-9, atol=1e-9)
        assert got["out"].stride() == expected["out"].stride()


@pytest.mark.parametrize("block_case", [SMALL, case("bottleneck", "identity"), case("basic", "zeropad")], ids=str)
def test_a_call_like_the_last_one_is_not_read_again(block_case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _ = stock_case(block_case)
    twin = fused_twin(block)
    twin(x)
    read = fused_block.read_block
    monkeypatch.setattr(fused_block, "read_block", lambda *_: pytest.fail("read again"))
    with expect_paths(fused_forward=2, fused_backward=1):
        twin(x).sum().backward()
        twin(x + 1)
    monkeypatch.setattr(fused_block, "read_block", read)
    with expect_paths(fused_forward=1), torch.autocast("cpu"):
        twin(x)
    with expect_paths(fused_forward=1), fusedres.use_backend("reference"):
        twin(x)
    fusedres.fuse(twin, memory="min")
    assert plan_of(twin, x, "cpu")[0].checked


def test_calls_in_either_mode_by_turns_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, _ = stock_case(SMALL)
    twin = fusedres.fuse(block)
    for mode in (True, False):
        twin.train(mode)(x)
    monkeypatch.setattr(fused_block, "read_block", lambda *_: pytest.fail("read again"))
    for mode in (True, False, True):
        twin.train(mode)(x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_model_that_was_converted_to_channels_last(memory_format: torch.memory_format) -> None:
    block, x, _ = stock_case(SMALL, memory_format=memory_format)
    twin = fusedres.fuse(copy.deepcopy(block))
    strides = []
    for model in (block, twin):
        model(x)
        model.to(memory_format=torch.channels_last)
        strides.append(model(x).stride())
    assert strides[0] == strides[1]


def test_old_tensors_are_not_kept_alive() -> None:
    block, x, _ = stock_case(SMALL)
    twin = fusedres.fuse(block)
    twin.eval()(x)
    old = weakref.ref(twin.conv1.weight)
    twin.load_state_dict({name: value.clone() for name, value in twin.state_dict().items()}, assign=True)
    twin.train()(x)
    assert old() is None
    leaf = twin.conv1.weight.detach().clone().requires_grad_()
    made = leaf * 2
    graph = weakref.ref(made)
    torch.func.functional_call(twin, {"conv1.weight": made}, (x,))
    del made
    assert graph() is None


def test_what_is_remembered_is_not_copied() -> None:
    block, x, _ = stock_case(SMALL)
    twin = fusedres.fuse(block)
    twin(x)
    assert "fused_calls" in twin.__dict__ and "fused_calls" not in copy.deepcopy(twin).__dict__
    assert "fused_calls" not in fusedres.unfuse(twin).__dict__
