"""The compiled C++ core: every instruction set passes the same tests; sizes beyond 32 bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedres import _C, ops
from fusedres.values import Norm

TESTS = Path(__file__).parent


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_op_tests_on_lower_instruction_sets(isa):
    if isa not in _C.build_info()["isa_built"]:
        pytest.skip(f"{isa} is not built for this processor")
    if _C.build_info()["isa_used"] == "portable":
        pytest.skip("the other tests already use the lowest instruction set of this processor")
    tested = ("bn_statistics", "bn_relu", "bn_add_relu", "shortcut_grad", "gram", "one_pass", "dense_block_ops")
    files = [f"test_{op}.py" for op in tested]
    selection = "cpu and not (test_gram and one_pass)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *files],
        cwd=TESTS,
        env={**os.environ, "FUSEDRES_ISA": isa, "PYTEST_ADDOPTS": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def test_requested_instruction_set_is_used():
    code = "import torch; from fusedres import _C; print(_C.build_info()['isa_used'])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FUSEDRES_ISA": "portable"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "portable"


@pytest.mark.parametrize(
    "pixels", [(0, 0, 1, 2, 2, 1), (0, 0, 1, 2, 2, 1, 8, 0), (0, 0, 1, 2, 2.5, 1, 8), (-1, 0, 1, 2, 2, 1, 8), 0, None]
)
def test_a_wrong_tuple_is_a_type_error(pixels):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.bn_relu(pixels, 0, 0, 0, 1)


def _free_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")), 0.0)


def test_more_than_two_to_the_31_values():
    if _free_gib() < 8:
        pytest.skip("needs 8 GiB of free memory")
    height = (2**31 // (64 * 1024)) + 3
    x = torch.empty((1, 64, height, 1024), dtype=torch.bfloat16, memory_format=torch.channels_last)
    _C.advise_huge_pages(x.data_ptr(), x.numel() * 2)
    x.fill_(-1.0)
    assert x.numel() > 2**31
    x[0, :, -1, -1] = 3.0
    identity = torch.zeros(4, 64)
    identity[1:3] = 1
    state = ops.bn_statistics(x, Norm(None, None, None, None, None, 0.1, 0.0), backend="cpu")
    share = 1 / (height * 1024)
    assert torch.allclose(state[0].double(), torch.tensor(-1 + 4 * share).double().expand(64), atol=1e-9)
    assert torch.allclose(
        state[1].double() ** -2, torch.tensor(16 * share * (1 - share)).double().expand(64), rtol=1e-5
    )
    ops.bn_relu_(x, identity, backend="cpu")
    assert x[0, 63, -1, -1] == 3.0 and x[0, 0, -1, -2] == 0.0 and x[0, 5, 0, 0] == 0.0
