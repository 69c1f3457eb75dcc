"""A pytest plugin that writes the outcome of each test to a journal when the test ends.

Tests that are already in the journal are left out, so that a run continues after a crash. An error after which the
process cannot use the GPU any more ends the process, so that later tests do not all fail; pytest-xdist then starts
another process.

Environment variables: FUSEDRES_SUITE_OUT and _STEP (which journal); _SEEN (how many bytes of the journal count for this
run, because every worker must collect the same tests, also one that replaces a crashed worker); _LIMIT (the number of
tests per file, 0 for all).
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from suite.journal import Journal
from suite.settings import first_lines

# After one of these errors the process cannot use the GPU any more.
_LOST = (
    "illegal memory access", "misaligned address", "unspecified launch failure", "device-side assert",
    "illegal instruction",
)  # fmt: skip

_journal = Journal(Path(os.environ["FUSEDRES_SUITE_OUT"]), os.environ["FUSEDRES_SUITE_STEP"])
_seen = int(os.environ.get("FUSEDRES_SUITE_SEEN", "0"))
_limit = int(os.environ.get("FUSEDRES_SUITE_LIMIT", "0"))


@pytest.hookimpl(trylast=True)  # after -k has selected tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    by_file: dict[Path, list[pytest.Item]] = defaultdict(list)
    for item in items:
        by_file[item.path].append(item)
    if _limit:  # tests spread over the whole file
        for path, found in by_file.items():
            by_file[path] = found[:: -(-len(found) // _limit)]
    seen = {row["test"] for row in _journal.rows(_seen) if "test" in row}
    kept = {item.nodeid for found in by_file.values() for item in found if item.nodeid not in seen}
    items[:] = [item for item in items if item.nodeid in kept]


def pytest_collection_finish(session: pytest.Session) -> None:
    if getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"] == "gw0":
        _journal.append(case="collected", tests=len(session.items))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    in_worker = "PYTEST_XDIST_WORKER" in os.environ
    text = str(report.longrepr or "")
    lost = report.failed and any(sign in text for sign in _LOST)
    if (lost or not in_worker) and (report.when == "call" or not report.passed):
        _journal.append(**_row(report, text))
    if lost:
        os._exit(70)


def _row(report: pytest.TestReport, text: str) -> dict[str, Any]:
    row: dict[str, Any] = {"case": "test", "test": report.nodeid, "outcome": report.outcome, "s": report.duration}
    if report.failed:
        said = [line.removeprefix("E").strip() for line in text.splitlines() if line.startswith("E ")]
        row["error"] = first_lines("\n".join(said) or text)
    elif report.skipped:
        row["why"] = text[-160:]
    return row
