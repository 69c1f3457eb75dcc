"""The tests on this device, last failures first, and a few of them again under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT

from suite.journal import Journal
from suite.settings import Case, Settings, first_lines

OPS = (
    "conv_fprop", "conv_dgrad", "conv_wgrad", "conv_weights", "gram", "one_pass_tail", "bn_statistics", "bn_backward",
    "bn_relu", "bn_add_relu", "bn_add_relu_backward", "bn_relu_maxpool", "shortcut_grad", "shortcut",
)  # fmt: skip
FILES = ("test_conv_blocks.py", "test_stem.py", *(f"test_{op}.py" for op in OPS))
# Of the files of ops only what runs on a GPU: a backend's name is in the id.
WANTED = "triton or cuda or test_conv_blocks or test_stem"
TINY = ("test_shortcut_grad.py", "test_gram.py")
TOOLS = ("memcheck", "racecheck")


def cases(settings: Settings) -> list[Case]:
    """One: the whole run."""
    return [Case("pytest", lambda: _tests(settings), limit=3600)]


def sanitizer_cases(settings: Settings) -> list[Case]:
    """One a tool."""
    return [Case(tool, lambda tool=tool: _sanitize(settings, tool), limit=3600) for tool in TOOLS]


def _pytest(settings: Settings, limit: int, *more: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment."""
    files = [f"tests/{name}" for name in (TINY if settings.tiny else FILES) if (ROOT / "tests" / name).exists()]
    command = [sys.executable, "-m", "pytest", "-p", "pytest_rows", "-q", "--tb=short", "-k", WANTED]
    paths = str(ROOT / "benchmarks"), str(ROOT / "tests")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, (*paths, os.environ.get("PYTHONPATH")))),
        "FUSEDRES_SUITE_OUT": str(settings.out.resolve()),
        "FUSEDRES_SUITE_STEP": settings.step,
        "FUSEDRES_SUITE_LIMIT": str(limit),
    }
    return [*command, *more, *files], environment


def _tests(settings: Settings) -> None:
    parallel = ["-n", str(min(8, os.cpu_count() or 1)), "--max-worker-restart=40"]
    if settings.tiny or not importlib.util.find_spec("xdist"):
        parallel = []
    if settings.on_gpu and importlib.util.find_spec("pytest_timeout"):
        parallel += ["--timeout=120", "--timeout-method=thread"]
    with tempfile.TemporaryDirectory() as cache:
        failed = dict.fromkeys(_before(settings), True)
        (Path(cache) / "v" / "cache").mkdir(parents=True)
        (Path(cache) / "v" / "cache" / "lastfailed").write_text(json.dumps(failed))
        for _ in range(5):  # each goes on behind the crash of the one before
            command, environment = _pytest(settings, 2 if settings.tiny else 0, "--ff", "-o", f"cache_dir={cache}")
            code = subprocess.run([*command, *parallel], env=environment, cwd=ROOT, check=False).returncode
            rows = settings.journal.rows()
            collected = next((row["tests"] for row in rows if row["case"] == "collected"), 0)
            if code == 5 or (collected and len({row["test"] for row in rows if "test" in row}) >= collected):
                return
            settings.row("crash", error=f"pytest ended with exit code {code} before all tests had run")


def _before(settings: Settings) -> list[str]:
    """Tests that failed when this step last ran."""
    kept = [test for line in settings.journal.lines() if line.get("event") == "before" for test in line["failed"]]
    return kept + failures(settings.journal)


def failures(journal: Journal) -> list[str]:
    """Tests that failed."""
    return list({row["test"]: None for row in journal.rows() if row.get("outcome") == "failed"})


def _sanitize(settings: Settings, tool: str) -> None:
    found = shutil.which("compute-sanitizer")
    if not settings.on_gpu or found is None:
        why = "compute-sanitizer is not on the PATH" if settings.on_gpu else "no GPU"
        settings.row(tool, skipped=why)
        return
    command, environment = _pytest(settings, 2, "-p", "no:cacheprovider")
    environment |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "FUSEDRES_SUITE_STEP": f"sanitizer-{tool}"}
    with tempfile.TemporaryDirectory() as scratch:
        environment["FUSEDRES_SUITE_OUT"] = scratch
        tested = [found, "--tool", tool, "--target-processes", "all", "--error-exitcode", "99", "--print-limit", "20"]
        with (Path(scratch) / "out").open("w+") as text:
            code: int | None
            try:
                done = subprocess.run(
                    [*tested, *command], env=environment, cwd=ROOT, stdout=text, stderr=subprocess.STDOUT, check=False,
                    timeout=max(5.0, settings.left / (len(TOOLS) - TOOLS.index(tool)) - 5),
                )  # fmt: skip
                code = done.returncode
            except subprocess.TimeoutExpired:
                code = None
            text.seek(0)
            said = text.read()
        tests = [row for row in Journal(Path(scratch), f"sanitizer-{tool}").rows() if "test" in row]
    messages = [line for line in said.splitlines() if line.startswith("=========")]
    summary = [line for line in messages if "SUMMARY" in line]
    errors = sum(int(n) for line in summary for n in re.findall(r"(\d+) (?:error|hazard)", line))
    settings.row(
        tool,
        exit_code=code,
        timed_out=code is None,
        errors=errors,
        summary=summary[-3:],
        tests={what: sum(t["outcome"] == what for t in tests) for what in ("passed", "failed", "skipped")},
        messages=messages[:60] if errors else messages[:5],
        error=first_lines("\n".join(messages), 8) if errors else None,
        tail=said[-1500:] if code not in (0, None) else None,
    )
