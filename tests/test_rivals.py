"""The rivals of gpu_suite.py: cuDNN's fused inference, with stand-ins for its operators, and precisions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
BLOCKS = ("tiny.basic", "tiny.basic.projection", "tiny.basic.zero_pad", "tiny.bottleneck", "tiny.bottleneck.projection")


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    from common import blocks

    block = (blocks.TINY | blocks.STEM)[name]
    return blocks.make_block(block), blocks.make_input(block, 2, torch.device("cpu"), dtype)


def conv_relu(x, weight, bias, stride, padding, dilation, groups):
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()


def conv_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    return (F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()


@pytest.mark.parametrize("name", BLOCKS)
def test_folded_inference_by_cudnns_operators(name, monkeypatch):
    """With written-out operators, the folded block equals eager in eval mode."""
    from suite import rivals

    monkeypatch.setattr(rivals, "_conv_relu", conv_relu)
    monkeypatch.setattr(rivals, "_conv_add_relu", conv_add_relu)
    block, x = made(name)
    rival = rivals.cudnn(block.eval(), x)
    torch.testing.assert_close(rival(x), block(x), rtol=1e-4, atol=1e-4)


def test_the_operators_have_these_arguments():
    for name, names in (
        ("cudnn_convolution_relu", "self weight"),
        ("cudnn_convolution_add_relu", "self weight z alpha"),
    ):
        schema = getattr(torch.ops.aten, name).default._schema
        expected = [*names.split(), "bias", "stride", "padding", "dilation", "groups"]
        assert [argument.name for argument in schema.arguments] == expected


def test_reasons_instead_of_modules():
    from suite import rivals

    block, x = made("tiny.bottleneck")
    assert rivals.cudnn(*made("tiny.stem")) == rivals.NO_BLOCK
    if not torch.cuda.is_available():
        assert "cannot be used: Could not run" in rivals.cudnn(block.eval(), x)


def test_precisions_switch_tf32_and_set_it_back():
    from suite.precision import PRECISIONS

    def state() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    before = state()
    for name, expected in (("tf32", (True, True)), ("float32", (False, False)), ("bfloat16", before)):
        with PRECISIONS[name].switched():
            assert state() == expected
        assert state() == before
