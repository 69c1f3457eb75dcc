"""Run again what was wrong in an earlier call: cases with an error, and failed tests."""

from __future__ import annotations

from suite import checks, miscompiled, right
from suite.journal import Journal
from suite.settings import Case, Settings

MOST = 300  # tests


def cases(settings: Settings) -> list[Case]:
    """Return the cases of ops, then the tests."""
    if settings.after is None:
        return []
    found = [
        case
        for step, listed in (("right", right.cases), ("miscompiled", miscompiled.cases))
        for case in listed(settings)
        if case.name in _failed(Journal(settings.after, step))
    ]
    tests = checks.failures(Journal(settings.after, "tests"))[:MOST]
    if tests:
        found.append(Case("pytest", lambda: checks.run(settings, *tests), limit=3600))
    return found


def _failed(journal: Journal) -> set[str]:
    return {row["case"] for row in journal.rows() if row.get("error")}
