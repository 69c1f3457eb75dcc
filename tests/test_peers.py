"""tests/peers/run.py on a folder of tests that looks like torchvision's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import compatibility_page
import pytest

SCRIPT = Path(__file__).parent / "peers" / "run.py"

TESTS = """
import pytest
import torch
from torchvision import models
from torchvision.models import get_model_builder

@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d"])
def test_forward(name):
    x = torch.randn(1, 3, 32, 32)
    assert get_model_builder(name)().eval()(x).shape == (1, 1000)

def is_stock():
    return type(models.resnet18()) is models.ResNet

@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_only_stock(name):
    assert is_stock()

@pytest.mark.parametrize("name", ["resnet18"])
def test_rounding(name):
    assert is_stock() or torch.get_default_dtype() is torch.float64

@pytest.mark.parametrize("name", ["resnet18"])
def test_never(name):
    assert False
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "test_models.py").write_text(TESTS)
    (tmp_path / "test_backbone_utils.py").write_text("")
    return tmp_path


def start(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_lost_tests_are_found(folder: Path) -> None:
    done = start("--torchvision", folder, "--jobs", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [re.split("  +", line) for line in done.stdout.splitlines() if line.startswith("torchvision  ")]
    assert rows == [
        ["torchvision", "`test_forward`", "2", "2", "0", "2"],
        ["torchvision", "`test_only_stock`", "1", "0", "0", "0"],
        ["torchvision", "`test_rounding`", "1", "0", "1", "0"],
    ]
    assert "only unfused: torchvision: test_models.py::test_only_stock[resnet18]" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["test_backbone_utils.py", "test_models.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "pass a folder with tests"),
        (["--timm", "."], "has no test_models.py: pass the folder of timm's tests"),
    ],
)
def test_usage_errors(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2 and message in done.stderr, done.stderr


def test_no_test_of_others_is_lost() -> None:
    """In the committed table, each test that passes as it is passes fused too, in float32 or in float64.

    timm's test_model_forward_fx demands the same bits of a fused model and its torch.fx twin, which is stock.
    """
    rows = compatibility_page.read("tests")
    assert {row[0] for row in rows} == {"torchvision", "timm"}
    assert any(int(row[5]) for row in rows)
    for package, test, passed, fused, in_float64, _ in rows:
        lost = int(passed) - int(fused) - int(in_float64)
        assert lost == 0 or (package, test) == ("timm", "`test_model_forward_fx`"), (package, test)
