"""Run in an environment with the lowest supported torch and its Triton: import, fuse, train a step, infer, compile; and
launch what gpu_pack.py compiled.
"""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch
import torchvision
import triton
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fusedres


def train_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    """Loss and every gradient of one step."""
    loss = nn.functional.cross_entropy(model(images), labels)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def check(what: str, fused: list[torch.Tensor], eager: list[torch.Tensor]) -> None:
    """In float64 the only difference is the order of sums."""
    for index, (ours, theirs) in enumerate(zip(fused, eager, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9, msg=lambda text, i=index: f"{what}, {i}: {text}")
    print(f"{what}: {len(fused)} tensors equal eager's")


def check_kernels(root: Path) -> None:
    """Every Triton kernel that a block launches, as it is launched there; in float64, too, for gradcheck."""
    sys.path.insert(0, str(root / "benchmarks"))
    import inspect_kernels

    ways = ("library", "fused", "fused min")
    for dtype, arch in product((torch.bfloat16, torch.float64), (90, 80)):
        runs = inspect_kernels.cases("resnet50.layer2.0", ways, dtype=dtype).values()
        made = [launch for run in runs for launch in inspect_kernels.record(run, arch)]
        rows = inspect_kernels.inspect_launches(made, arch, limit=1)
        found = [row for row in rows if row.problems]
        if found:
            raise SystemExit(inspect_kernels.table(found))
        kernels = len({row.kernel for row in rows})
        print(f"{kernels} kernels, {len(rows)} times compiled for sm_{arch} by Triton {triton.__version__}, {dtype}")


def check_pack(root: Path) -> None:
    """With what gpu_pack.py built, a block launches on a stubbed driver without a compilation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(root / "benchmarks" / "gpu_pack.py"), "--out", folder, "--blocks", "tiny.basic"]
        subprocess.run([*command, "--no-wheel"], check=True)
        subprocess.run([*command, "--rehearse"], check=True)


def main() -> None:
    print(f"fusedres {fusedres.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}")
    if not torch.__version__.startswith("2.11."):
        raise SystemExit(f"this check is for torch 2.11, the lowest supported one, not {torch.__version__}")
    if (Path(__file__).parents[1] / "fusedres").samefile(Path(fusedres.__file__).parent):
        raise SystemExit("the installed wheel is to be checked, not the checkout")

    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(memory_format=torch.channels_last)
    labels = torch.tensor([0, 1, 2, 3])
    for build in (torchvision.models.resnet18, torchvision.models.resnet50):
        eager = build(num_classes=10).double().to(memory_format=torch.channels_last)
        fused = fusedres.fuse(copy.deepcopy(eager))
        unfused = [block for block in fusedres.report(fused) if not block.fused]
        if unfused:
            raise SystemExit(f"not fused: {unfused}")
        name = build.__name__
        check(f"{name} train step", train_step(fused, images, labels), train_step(eager, images, labels))
        check(f"{name} buffers", list(fused.buffers()), list(eager.buffers()))
        with torch.inference_mode():
            check(f"{name} inference", [fused.eval()(images)], [eager.eval()(images)])

    for block in (BasicBlock(8, 8), Bottleneck(32, 8)):
        model = fusedres.fuse(nn.Sequential(block, nn.AdaptiveAvgPool2d(1), nn.Flatten())).double()
        for size in (6, 1):  # at 1x1 both memory formats are one
            torch.compiler.reset()
            compiled = torch.compile(model, backend="aot_eager")  # torch 2.11 traces no context variable: no fullgraph
            images = torch.randn(4, block.conv1.in_channels, size, size, dtype=torch.float64)
            name = f"{type(block).__name__} compiled, {size}x{size}"
            check(name, train_step(compiled, images, labels), train_step(model, images, labels))

    check_kernels(Path(__file__).parents[1])
    check_pack(Path(__file__).parents[1])


if __name__ == "__main__":
    main()
