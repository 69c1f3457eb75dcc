"""One seed, one thread, oneDNN in use, and settings restored after each test."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# No test reads or writes the tables that were measured on this machine: nothing can be there.
os.environ["FUSEDRES_CACHE_DIR"] = "/dev/null/no-cache"

# Without a GPU, Triton kernels run in Triton's interpreter; read when triton is first imported, which torch puts off.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# float32 means float32 on a GPU too; a test of TF32 switches it on.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False

# Shapes are too small to split, and waiting threads would slow down whatever else runs; tests of threads set their own.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--fuzz N`: how many random blocks test_fuzz.py tries, of other seeds each time."""
    parser.addoption("--fuzz", type=int, metavar="N", help="random blocks to try (default: 300 of fixed seeds)")


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Every test starts from the same seed; the thread count, and whether oneDNN is used, stay as they were."""
    torch.manual_seed(0)
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    yield
    torch.backends.mkldnn.enabled = onednn
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture
def full_precision() -> Iterator[None]:
    """Torch's convolutions compute float32 in float32, which is not the default on a GPU."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(scope="module")
def benchmark_scripts() -> Iterator[None]:
    """The benchmarks' folder on the path."""
    folder = str(Path(__file__).resolve().parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def example() -> Iterator[SimpleNamespace]:
    """The modules of examples/train.py, imported as the script imports them and forgotten afterwards; one thread."""
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
    """120 PNG files in two classes, bright above and bright below."""
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
