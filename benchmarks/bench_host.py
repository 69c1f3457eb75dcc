"""Times the overhead of calling a block with tiny tensors: forward, backward and inference, eager against fused.

    python benchmarks/bench_host.py                on the GPU if there is one, else on the CPU; takes seconds
    python benchmarks/bench_host.py --blocks tiny.basic --rounds 3000

The table has microseconds until a call returns, without waiting for the GPU, on one CPU thread. Eager and fused take
turns; the ratio is the median over rounds, with its 95% interval. The last line is a part of each call: the check that
nobody has replaced the code that a fused block bypasses.
"""

from __future__ import annotations

import argparse
import copy
import time
import timeit
from collections.abc import Callable

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

import torch
from common import blocks, harness
from torch import nn
from torchvision.models.resnet import BasicBlock

import fusedres
from fusedres.modules.genuine import replaced_code

PHASES = ("forward", "backward", "infer")
HEADER = ["block", "phase", "eager us", "fused us", "ratio (95%)"]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line, with defaults that depend on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__.partition("\n\n")[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    parser.add_argument("--blocks", nargs="+", default=["tiny.b*"], help="names or patterns (default: tiny.b*)")
    parser.add_argument("--rounds", type=int, default=1000, help="calls of each variant (default: 1000)")
    parser.add_argument("--backend", help="backend of the fused ops (default: FUSEDRES_BACKEND, else auto)")
    options = parser.parse_args(argv)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.rounds < 1:
        parser.error(f"--rounds: must be at least 1, got {options.rounds}")
    return options


def calls(module: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Return phase → a function that makes one call and returns its seconds; backward follows an untimed forward."""

    def timed(call: Callable[[], object]) -> float:
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def forward() -> float:
        module.train()
        return timed(lambda: module(x))

    def infer() -> float:
        module.eval()
        with torch.no_grad():
            return timed(lambda: module(x))

    def backward() -> float:
        out = module.train()(x)
        seconds = timed(lambda: out.backward(grad))
        module.zero_grad(set_to_none=True)
        x.grad = None
        return seconds

    return {"forward": forward, "backward": backward, "infer": infer}


def measure(module: nn.Module, x: torch.Tensor, rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Return phase → the samples of eager and of fused."""
    fused = fusedres.fuse(copy.deepcopy(module))
    grad = torch.ones_like(module(x))
    both = [calls(each, x, grad) for each in (module, fused)]
    samples: dict[str, tuple[list[float], list[float]]] = {phase: ([], []) for phase in PHASES}
    for index in range(-10, rounds):  # the first 10 rounds warm up
        for phase in PHASES:
            for mine, kept in zip(both, samples[phase], strict=True):
                seconds = mine[phase]()
                if index >= 0:
                    kept.append(seconds)
    return samples


def seconds_of_comparison() -> float:
    """Return the least time, over several series, of the check that no bypassed code was replaced."""
    cls, base = fusedres.FusedBasicBlock, BasicBlock
    return min(timeit.repeat(lambda: replaced_code(cls, base), number=2000, repeat=20)) / 2000


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the table."""
    options = parse(argv)
    device = torch.device(options.device)
    torch.set_num_threads(1)
    lines = []
    with fusedres.use_backend(options.backend or "auto"):
        for name, block in blocks.select(options.blocks).items():
            module = blocks.make_block(block).to(device).to(memory_format=torch.channels_last)
            x = blocks.make_input(block, 1, device, torch.float32).requires_grad_()
            for phase, (eager, fused) in measure(module, x, options.rounds).items():
                ratio = harness.ratio_interval(eager, fused)
                medians = [f"{harness.summarize(samples).median * 1e6:.1f}" for samples in (eager, fused)]
                lines.append([name, phase, *medians, f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"])
    print(f"{harness.machine(device)['device']}, torch {torch.__version__}, float32, batch 1, one thread")
    if note := harness.busy_note(device):
        print(note)
    harness.print_table(HEADER, lines)
    print(f"comparing the code that is bypassed: {seconds_of_comparison() * 1e6:.2f} us per call")


if __name__ == "__main__":
    raise SystemExit(run(main, "bench_host.py"))
