"""Fixtures of all tests. Every test starts with the same seed and one thread; settings are restored after it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# No test may read or write the tables that were measured on this machine: no file can exist at this path.
os.environ["FUSEDRES_CACHE_DIR"] = "/dev/null/no-cache"

# Without a GPU, Triton kernels run in Triton's interpreter. Triton reads this variable when it is first imported, and
# importing torch does not import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# float32 means float32 on a GPU too; tests of TF32 switch TF32 on.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False

# The shapes are too small to split among threads, and waiting threads would slow down other processes. Tests of threads
# set their own number.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--fuzz N`: the number of random blocks that test_fuzz.py tries, with new seeds in each run."""
    parser.addoption("--fuzz", type=int, metavar="N", help="random blocks to try (default: 300 with fixed seeds)")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Start every test from the same seed; restore the thread count and the use of oneDNN after it."""
    torch.manual_seed(0)
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    yield
    torch.backends.mkldnn.enabled = onednn
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Make torch's convolutions compute float32 in float32, which is not the default on a GPU."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(scope="module")
def benchmark_scripts() -> Iterator[None]:
    """Put the benchmarks' folder on the import path."""
    folder = str(Path(__file__).resolve().parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """Import the modules of examples/train.py as the script does, on one thread, and forget them afterwards."""
    folder = Path(__file__).resolve().parent.parent / "examples"
    names = sorted(path.stem for path in folder.glob("*.py"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    before = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        torch.set_num_threads(threads)
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(before)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 120 PNG files in two classes: a bright upper half and a bright lower half."""
    import numpy as np
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, half in (("above", slice(0, 6)), ("below", slice(6, 12))):
        (root / label).mkdir()
        for i in range(60):
            pixels = rng.integers(0, 100, (12, 12, 3), dtype=np.uint8)
            pixels[half] += 120
            Image.fromarray(pixels).save(root / label / f"{i}.png")
    return root


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count how often each pass is served in C++."""
    from fusedres.autograd import cpu_passes

    counts = dict.fromkeys(("forward", "infer", "backward"), 0)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            found = function(*args)
            counts[name] += found is not None
            return found

        return call

    for name in counts:
        monkeypatch.setattr(cpu_passes, name, counted(name, getattr(cpu_passes, name)))
    return counts


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a function that runs another function with the passes in Python."""
    from fusedres.autograd import cpu_passes

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(cpu_passes, "_serves", lambda x, plan: False)
            return function(*args)

    return call
