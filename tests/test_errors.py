"""Errors for bad input name the op, the argument, what was expected, what was given, and the remedy.

The checks come before anything is computed: running statistics and counters keep their values bit by bit.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from fusion import MEMORY, fused_twin, label, stock_case
from reference import build
from shapes import CORE, Case, case
from torch import Tensor, nn

import fusedres

# `op: argument must ..., got ...; remedy`
SENTENCE = re.compile(r"^Fused(BasicBlock|Bottleneck): .*(must|expected) .*got .+; .+", re.DOTALL)


def buffers_of(block: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in block.named_buffers()}


def refused(block: nn.Module, x: Tensor, error: type[Exception], *words: str) -> None:
    """Assert that the call raises `error` with a full message that contains the words, and changes no buffer."""
    before = buffers_of(block)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(error) as raised:
            block(x)
        assert isinstance(raised.value, error), raised.value
        if error is not ValueError or "more than 1 value" not in str(raised.value):
            assert isinstance(raised.value, RuntimeError), raised.value  # torch's class
        message = str(raised.value)
        assert SENTENCE.match(message), message
        for word in words:
            assert word in message, f"{word!r} is not in {message!r}"
        after = buffers_of(block)
        assert all(torch.equal(after[name], buffer) for name, buffer in before.items()), message


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_wrong_channels(case: Case, memory: str, mode: str) -> None:
    block, _, _ = stock_case(case, mode=mode)
    wrong = torch.randn(2, case.in_channels + 1, 5, 5)
    refused(fused_twin(block, memory), wrong, ValueError, "x", str(case.in_channels), str(tuple(wrong.shape)))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_a_shortcut_of_another_shape(block: str, mode: str) -> None:
    """There is no downsample although the shape changes, or it has another width, or another stride."""
    changing = build(case(block, "projection")).train(mode == "train")
    changing.downsample = None
    x = torch.randn(2, case(block, "projection").in_channels, 6, 6)
    refused(fusedres.fuse(changing), x, ValueError, "shortcut", "downsample")

    for in_channels, out_channels, stride in ((16, 24, 2), (16, 32, 1), (12, 32, 2)):
        wrong = build(case(block, "projection", planes=32 if block == "basic" else 8)).train(mode == "train")
        wrong.downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
        )
        refused(fusedres.fuse(wrong.train(mode == "train")), torch.randn(2, 16, 6, 6), ValueError, "downsample")
        wrong.downsample = fusedres.ZeroPadShortcut(in_channels, out_channels, stride)
        refused(wrong, torch.randn(2, 16, 6, 6), ValueError)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_mixed_dtypes(case: Case, mode: str) -> None:
    block, x, _ = stock_case(case, mode=mode)
    twin = fused_twin(block)
    refused(twin, x.double(), TypeError, "float64", "float32")
    refused(twin, x.bfloat16(), TypeError, "bfloat16", "float32")
    refused(twin.double(), x, TypeError, "float32", "float64")
    twin.float().bn1.double()
    refused(twin, x, TypeError, "bn1", "float64")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64], ids=label)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_inputs_that_are_not_real_floats(case: Case, dtype: torch.dtype) -> None:
    block, x, _ = stock_case(case)
    refused(fused_twin(block), x.to(dtype), TypeError, "x", str(dtype))


@pytest.mark.parametrize("case", CORE, ids=label)
def test_devices_must_match(case: Case) -> None:
    block, x, _ = stock_case(case)
    twin = fused_twin(block)
    twin.conv2.to("meta")
    refused(twin, x, RuntimeError, "conv2.weight", "meta", "cpu")
    twin = fused_twin(block)
    twin.bn1.weight = nn.Parameter(twin.bn1.weight.to("meta"))
    before = twin.bn1.running_mean.clone()
    with pytest.raises(RuntimeError, match=r"bn1 .*meta"):
        twin(x)
    assert torch.equal(twin.bn1.running_mean, before)


@pytest.mark.parametrize("shape", [(4, 6, 6), (6, 6), (), (2, 4, 6, 6, 6)], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_than_four_dimensions(shape: tuple[int, ...], mode: str) -> None:
    for base in CORE:
        block, _, _ = stock_case(base, mode=mode)
        refused(fused_twin(block), torch.randn(shape), ValueError, "x", "4", str(shape))


@pytest.mark.parametrize("height", [0, 1])
def test_images_smaller_than_nothing(height: int) -> None:
    """A side of length 0 is an error of torch's convolution; a side of length 1 is allowed."""
    for base in CORE:
        twin = fused_twin(stock_case(base)[0])
        x = torch.randn(3, base.in_channels, height, 4)
        if height:
            assert twin(x).shape[2] == 1
        else:
            before = buffers_of(twin)
            with pytest.raises((ValueError, RuntimeError)):
                twin(x)
            assert all(torch.equal(b, before[name]) for name, b in twin.named_buffers())


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_one_value_a_channel_is_torchs_own_error(case: Case, memory: str) -> None:
    """The message is torch's, and no running statistics have changed, not even those of earlier BatchNorms."""
    block, _, _ = stock_case(case)
    for size in (1, case.stride):  # with stride 2 a 2x2 image has four values before the stride, one after it
        x = torch.randn(1, case.in_channels, size, size)
        twin = fused_twin(block, memory)
        before = buffers_of(twin)
        with pytest.raises(ValueError, match="more than 1 value per channel") as eager:
            build(case)(x)
        with pytest.raises(ValueError, match="more than 1 value per channel") as raised:
            twin(x)
        assert str(raised.value) == str(eager.value)
        for name, buffer in twin.named_buffers():
            if "num_batches" not in name:
                assert torch.equal(buffer, before[name]), name
        with torch.no_grad():
            torch.testing.assert_close(twin.eval()(x), copy.deepcopy(block).eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cuda:0", "", "CPU", "native"])
def test_unknown_backends(name: str) -> None:
    expected = rf"use_backend: expected one of auto, reference, cpu.*got {name!r}"
    with pytest.raises(ValueError, match=expected), fusedres.use_backend(name):
        raise AssertionError("entered")


def test_a_backend_that_does_not_serve_the_device() -> None:
    twin = fused_twin(stock_case(CORE[0])[0]).to("meta")
    with pytest.raises(RuntimeError, match=r"cpu.*meta.*; "), fusedres.use_backend("cpu"):
        twin(torch.empty(2, CORE[0].in_channels, 4, 4, device="meta"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((8, 4, 2), ValueError),
        ((0, 4, 1), ValueError),
        ((4, 8, 0), ValueError),
        ((4, 8, -1), ValueError),
        ((4.0, 8, 1), TypeError),
        ((4, "8", 1), TypeError),
        ((4, 8, 1.5), TypeError),
    ],
)
def test_zero_pad_shortcuts_that_cannot_be(arguments: tuple[int, int, int], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"ZeroPadShortcut: .*got .*"):
        fusedres.ZeroPadShortcut(*arguments)


def test_a_zero_pad_shortcut_by_itself() -> None:
    """It subsamples with a stride and adds zero channels at the end; it also works outside of a fused block."""
    shortcut = fusedres.ZeroPadShortcut(3, 5, 2)
    x = torch.randn(2, 3, 5, 4, requires_grad=True)
    out = shortcut(x)
    assert torch.equal(out[:, :3], x[:, :, ::2, ::2])
    assert out.shape == (2, 5, 3, 2)
    assert not out[:, 3:].any()
    out.sum().backward()
    assert x.grad.sum() == 2 * 3 * 3 * 2
    assert not list(shortcut.parameters())
    assert not shortcut.state_dict()


def test_a_gradient_of_another_shape_is_refused() -> None:
    block, x, grad = stock_case(CORE[0])
    with pytest.raises(RuntimeError, match=r"[Mm]ismatch in shape"):
        fused_twin(block)(x).backward(grad[:, :, 1:])
