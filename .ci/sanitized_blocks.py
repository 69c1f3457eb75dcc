"""Run by .ci/sanitized: fused blocks and the stem of odd sizes, forward and backward, on a core with the sanitizers."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, Bottleneck

import fusedres
from fusedres import _C
from fusedres.ops._library import OPS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def blocks() -> list[nn.Module]:
    """An identity, a strided projection and a zero-padded shortcut; widths off the vectors' on either side."""
    projection = nn.Sequential(nn.Conv2d(9, 17 * 4, 1, 2, bias=False), nn.BatchNorm2d(17 * 4))
    padded = BasicBlock(5, 33, 2, fusedres.ZeroPadShortcut(5, 33, 2))
    return [BasicBlock(31, 31), Bottleneck(9, 17, 2, projection), padded, Bottleneck(4, 1)]


def step(module: nn.Module, x: Tensor) -> None:
    """Training, with all gradients and with the input's alone, then inference."""
    module.train()(x.requires_grad_()).sum().backward()
    torch.autograd.grad(module(x).sum(), x)
    with torch.no_grad():
        module.eval()(x)


def overrun() -> None:
    """A kernel without the op that checks its arguments: a state of another width."""
    x = torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    OPS["bn_relu_"].kernel("cpu")(x, torch.randn(4, 1))


def main() -> None:
    """Every block by dtype, memory option, layout and threads."""
    assert "fusedres" in _C.__file__ and Path(fusedres.__file__).parent == Path(_C.__file__).parent
    assert b"__asan" in Path(_C.__file__).read_bytes(), f"{_C.__file__} was built without AddressSanitizer"
    torch.manual_seed(0)
    count = 0
    for dtype, memory, threads in itertools.product(DTYPES, ("auto", "min"), (1, 3)):
        torch.set_num_threads(threads)
        for block in blocks():
            channels = block.conv1.in_channels
            module = fusedres.fuse(block.to(dtype), memory=memory)
            assert all(row.fused for row in fusedres.report(module))
            for shape in ((2, channels, 7, 5), (3, channels, 2, 9)):
                for layout in (torch.contiguous_format, torch.channels_last):
                    step(module, torch.randn(shape, dtype=dtype).contiguous(memory_format=layout))
                    count += 1
    step(fusedres.fuse(resnet18(num_classes=3)), torch.randn(2, 3, 37, 50))
    print(f"{count} blocks and a ResNet-18: clean")


if __name__ == "__main__":
    overrun() if sys.argv[1:] == ["overrun"] else main()
