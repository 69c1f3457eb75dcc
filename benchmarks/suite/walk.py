"""Run blocks and the stem with a visitor that gets the first call of each op."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torchvision
from common import blocks
from common.networks import Block
from memory_traffic.closed_form import PHASES
from memory_traffic.launched import WAYS
from torch import Tensor

import fusedres
from fusedres.tune.calls import Visit
from suite.settings import Settings
from suite.timed_block import Bench, BlockCase, BlockSettings

TINY = {"tiny": Block("bottleneck", 16, 8, 16, 2, "projection")}  # large enough for a Gram matrix


def walk_block(
    settings: Settings, visit: Visit, name: str, block: Block, way: str, batch: int, dtype: torch.dtype
) -> None:
    """Run the training step and the inference of a block."""
    for phase in PHASES:
        bench = Bench(BlockCase(name, block, batch, phase), BlockSettings(settings.device, dtype))
        module = fusedres.fuse(copy.deepcopy(bench.stock), **WAYS[way][0])
        _walk(settings, visit, module, bench.x, bench.grad if phase == "train" else None, dtype)


def walk_stem(settings: Settings, visit: Visit, way: str, batch: int, dtype: torch.dtype) -> None:
    """Run the training step and the inference of the stem."""
    size = 16 if settings.tiny else 224
    torch.manual_seed(0)
    model = fusedres.fuse(torchvision.models.resnet18(), **WAYS[way][0])
    model.to(settings.device, memory_format=torch.channels_last)
    model.fused_conv = WAYS[way][0]["conv"]  # fuse() leaves the choice to measured tables
    x = torch.randn(batch, 3, size, size, device=settings.device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
    module = blocks.StemOnly(model)
    out = torch.empty(batch, 64, size // 4, size // 4, device=settings.device, dtype=dtype)
    grad = torch.randn_like(out).to(memory_format=torch.channels_last)
    _walk(settings, visit, module, x, grad, dtype)
    _walk(settings, visit, module.eval(), x, None, dtype)


def _walk(
    settings: Settings, visit: Visit, module: torch.nn.Module, x: Tensor, grad: Tensor | None, dtype: torch.dtype
) -> None:
    """Run forward, and backward from `grad` if given, on this thread."""
    around: Any = BlockSettings(settings.device, dtype).autocast
    with fusedres.use_backend("triton"), torch.autograd.set_multithreading_enabled(False), visit:
        if grad is None:
            with torch.inference_mode(), around():
                module(x)
        else:
            source = x.detach().requires_grad_(x.shape[1] > 3)
            with around():
                out = module(source)
            out.backward(grad)
