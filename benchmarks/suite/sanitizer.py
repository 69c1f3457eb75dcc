"""Run a few tests of each file under compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from common.harness import ROOT

from suite.checks import WANTED, files, pytest_of
from suite.journal import Journal
from suite.settings import Case, Settings, first_lines

TOOLS = ("memcheck", "racecheck")


def cases(settings: Settings) -> list[Case]:
    """Return one case per tool."""
    return [Case(tool, lambda tool=tool: _sanitize(settings, tool), limit=3600) for tool in TOOLS]


def _sanitize(settings: Settings, tool: str) -> None:
    found = shutil.which("compute-sanitizer")
    if not settings.on_gpu or found is None:
        why = "compute-sanitizer is not on the PATH" if settings.on_gpu else "no GPU"
        settings.row(tool, skipped=why)
        return
    command, environment = pytest_of(settings, 2, *files(settings), "-k", WANTED, "-p", "no:cacheprovider")
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
