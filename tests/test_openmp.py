"""Threads: one OpenMP runtime per process, torch.set_num_threads is respected, and results repeat bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fusion import MEMORY, fused_twin, label, stock_case
from processes import HANG
from reference import run
from shapes import CORE, Case, case, with_size

pytestmark = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")

RUNTIMES = """
import os, re
found = set()
for line in open("/proc/self/maps"):
    path = line.split(maxsplit=5)[5].strip() if len(line.split(maxsplit=5)) == 6 else ""
    if re.match(r"lib(gomp|iomp|omp)", os.path.basename(path)):
        found.add(os.path.realpath(path))
print("\\n".join(sorted(found)))
"""

BLOCK = """
import torch, fusedres
from torchvision.models.resnet import BasicBlock
block = fusedres.fuse(BasicBlock(64, 64).to(memory_format=torch.channels_last))
x = torch.randn(8, 64, 32, 32).to(memory_format=torch.channels_last).requires_grad_()
"""

THREADS = """
import os
def threads():
    return len(os.listdir("/proc/self/task"))
"""


def script(source: str, threads: int = 2) -> list[str]:
    """Return the lines that a new interpreter prints; it runs outside the checkout, with the installed package."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "KMP_", "MKL_"))}
    environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, env=environment, timeout=HANG, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize("first", ["import torch, fusedres", "import fusedres, torch", "from fusedres import _C"])
def test_one_openmp_runtime_in_the_process(first: str) -> None:
    """The extension shares torch's runtime, whichever is imported first; two runtimes would start twice the threads."""
    found = script(first + BLOCK + "block(x).sum().backward()\n" + RUNTIMES)
    assert len(found) == 1, found


def test_one_thread_starts_no_thread() -> None:
    """After torch.set_num_threads(1) a training step starts no new thread besides autograd's, which exist already."""
    (line,) = script(
        THREADS + BLOCK.replace("block =", "torch.set_num_threads(1)\nblock =", 1) + "before = threads()\n"
        "for _ in range(3):\n    block(x).sum().backward()\n"
        "print(before, threads())"
    )
    before, after = map(int, line.split())
    assert after == before


def test_more_threads_are_used_when_asked_for() -> None:
    """The fused ops alone, without any convolution, use as many threads as torch is set to."""
    (line,) = script(
        THREADS
        + "import torch, fusedres\ntorch.set_num_threads(1)\n"
        + "x = torch.randn(16, 64, 64, 64).to(memory_format=torch.channels_last)\n"
        + "def op():\n"
        + "    return torch.ops.fusedres.bn_statistics(x, None, None, None, None, None, 0.1, 1e-5, 'cpu')\n"
        + "one = op()\nbefore = threads()\ntorch.set_num_threads(3)\nthree = op()\n"
        + "print(before, threads(), torch.allclose(one, three, rtol=1e-5, atol=1e-6))"
    )
    before, after, same = line.split()
    assert int(after) - int(before) == 2
    assert same == "True"


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_a_step_repeats_bit_by_bit(case: Case, memory: str, threads: int) -> None:
    """Every kind of block repeats 100 times on one thread, and less often on two, which wait for busy cores."""
    torch.set_num_threads(threads)
    block, x, grad = stock_case(with_size(case, 3, 13, 11), memory_format=torch.channels_last)
    torch.use_deterministic_algorithms(True)
    try:
        first = run(fused_twin(block, memory), x, grad)
        for repeat in range(1, 100 if threads == 1 else 8):
            again = run(fused_twin(block, memory), x, grad)
            different = [name for name, value in first.items() if not torch.equal(value, again[name])]
            assert not different, f"repeat {repeat}: {different}"
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_large_step_repeats_bit_by_bit_on_two_threads() -> None:
    """Repeat 100 times at a size where the work is split among threads and chunks."""
    torch.set_num_threads(2)
    large = case("bottleneck", "identity", planes=16, batch=8, height=24, width=24)
    block, x, grad = stock_case(large, memory_format=torch.channels_last)
    for memory in MEMORY:
        first = run(fused_twin(block, memory), x, grad)
        for _ in range(49):
            again = run(fused_twin(block, memory), x, grad)
            assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("name", ["reference", "cpu", "auto"])
def test_the_environment_selects_the_backend(name: str) -> None:
    source = "from fusedres.backends import backend_for\nprint(backend_for('cpu'))"
    environment = os.environ | {"FUSEDRES_BACKEND": name}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == {"auto": "cpu"}.get(name, name)


def test_an_unknown_backend_in_the_environment_is_refused_at_import() -> None:
    environment = os.environ | {"FUSEDRES_BACKEND": "fast"}
    done = subprocess.run(
        [sys.executable, "-c", "import fusedres"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode != 0
    assert "FUSEDRES_BACKEND" in done.stderr
    assert "got 'fast'" in done.stderr
