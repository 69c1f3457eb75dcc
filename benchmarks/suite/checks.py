"""Run the tests of the GPU backends on this device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

from common.harness import ROOT

from suite.journal import Journal
from suite.settings import Case, Settings

OPS = (
    "conv_fprop", "conv_bn_add_relu", "conv_dgrad", "conv_wgrad", "conv_weights", "gram", "one_pass_tail",
    "bn_statistics", "bn_backward", "bn_relu", "bn_add_relu", "bn_add_relu_backward", "bn_relu_maxpool",
    "shortcut_grad", "shortcut", "gated_tail", "dense_block_ops",
)  # fmt: skip
STEM = ("test_stem.py", "test_stem_convolution.py", "test_stem_fusion.py")
FILES = ("test_conv_blocks.py", *STEM, *(f"test_{op}.py" for op in OPS))
# Of the tests of ops only those that run on a GPU: their ids contain the name of the backend.
WANTED = "triton or cuda or test_conv_blocks or test_stem"
TINY = ("test_shortcut_grad.py", "test_gram.py")
WORKERS = 12


def cases(settings: Settings) -> list[Case]:
    """Return one case: the whole run."""
    return [Case("pytest", lambda: run(settings, *files(settings), "-k", WANTED), limit=3600)]


def run(settings: Settings, *wanted: str) -> None:
    """Run pytest in several processes, and continue after a crash."""
    parallel = ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--max-worker-restart=40"]
    if settings.tiny or not importlib.util.find_spec("xdist"):
        parallel = []
    if settings.on_gpu and importlib.util.find_spec("pytest_timeout"):
        parallel += ["--timeout=120", "--timeout-method=thread"]
    for _ in range(5):
        command, environment = pytest_of(settings, 2 if settings.tiny else 0, *wanted, "-p", "no:cacheprovider")
        environment["FUSEDRES_SUITE_SEEN"] = str(settings.journal.size())
        code = subprocess.run([*command, *parallel], env=environment, cwd=ROOT, check=False).returncode
        rows = settings.journal.rows()
        collected = next((row["tests"] for row in rows if row["case"] == "collected"), 0)
        if code == 5 or (collected and len({row["test"] for row in rows if "test" in row}) >= collected):
            return
        settings.row("crash", error=f"pytest ended with exit code {code} before all tests had run")
        if code == 4:  # a test was not found
            return


def files(settings: Settings) -> list[str]:
    """Return the test files that run on a GPU."""
    return [f"tests/{name}" for name in (TINY if settings.tiny else FILES) if (ROOT / "tests" / name).exists()]


def pytest_of(settings: Settings, limit: int, *wanted: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of pytest; at most `limit` tests of each file, 0: all."""
    command = [sys.executable, "-m", "pytest", "-p", "pytest_rows", "-q", "--tb=short"]
    paths = str(ROOT / "benchmarks"), str(ROOT / "tests")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (*paths, os.environ.get("PYTHONPATH")))),
        "FUSEDRES_SUITE_OUT": str(settings.out.resolve()),
        "FUSEDRES_SUITE_STEP": settings.step,
        "FUSEDRES_SUITE_LIMIT": str(limit),
    }
    return [*command, *wanted], environment


def failures(journal: Journal) -> list[str]:
    """Return the tests that failed."""
    return list({row["test"]: None for row in journal.rows() if row.get("outcome") == "failed"})
