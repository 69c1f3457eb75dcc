"""Helpers of the block-level tests: fused twins of stock blocks, and checks of which path a block took."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from eager import Convolution, convolutions, trust_all
from reference import STOCK, ZeroPad, build, inputs, separate, set_mode
from shapes import Case
from torch import Tensor, nn

import fusedres
from fusedres.autograd import path_counts

BACKENDS = ("reference", "cpu")
MEMORY = ("auto", "min")
FORMATS = (torch.contiguous_format, torch.channels_last)


def fused_twin(block: nn.Module, memory: str = "auto", conv: str = "auto") -> nn.Module:
    """Return a fused deep copy of a stock block, with copies of its parameters and buffers and with its modes."""
    twin = copy.deepcopy(block)
    for child in twin.modules():
        if isinstance(child, (STOCK["basic"], STOCK["bottleneck"])) and isinstance(child.downsample, ZeroPad):
            child.downsample = zero_pad_of(child, child.downsample)
    fusedres.fuse(twin, memory=memory, conv=conv)
    report = fusedres.report(twin)
    assert report, "no residual block was found"
    assert all(row.fused for row in report), f"not fused:\n{report}"
    return twin


def zero_pad_of(block: nn.Module, downsample: ZeroPad) -> nn.Module:
    conv1 = block.conv1
    assert isinstance(conv1, nn.Conv2d)
    shortcut = fusedres.ZeroPadShortcut(conv1.in_channels, conv1.in_channels + downsample.added, downsample.stride)
    return shortcut.train(downsample.training)


def stock_case(
    case: Case,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
    mode: str = "train",
    **options: object,
) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a stock block in this mode, its input and output gradient; no pre-activation lies near zero.

    torch's convolutions of the block are sound for the rest of the test (eager.py).
    """
    block = set_mode(build(case, dtype, memory_format, **options), mode)  # type: ignore[arg-type]
    x, grad = inputs(case, dtype, memory_format)
    if x.numel():
        separate(block, x)
        trust_all(made_by(case, dtype, memory_format))
    return block, x, grad


@cache
def made_by(case: Case, dtype: torch.dtype, memory_format: torch.memory_format) -> frozenset[Convolution]:
    """Return the convolutions of a stock block, run in eval mode, which also takes one value per channel."""
    return convolutions(build(case, dtype, memory_format).eval(), inputs(case, dtype, memory_format)[0])


@contextmanager
def expect_paths(**expected: int) -> Iterator[None]:
    """Assert how often each path runs inside; paths that are not named must not run."""
    before = path_counts.copy()
    yield
    ran = {name: path_counts[name] - before[name] for name in path_counts if path_counts[name] != before[name]}
    assert ran == {name: count for name, count in expected.items() if count}, f"paths that ran: {ran}"


def name_of(memory_format: torch.memory_format) -> str:
    return "nhwc" if memory_format == torch.channels_last else "nchw"


def label(value: object) -> str | None:
    """Return a test id: the short name of a dtype or memory format, or the text of a case."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, torch.memory_format):
        return name_of(value)
    if isinstance(value, Case):
        return str(value)
    return None
