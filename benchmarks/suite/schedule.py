"""The schedule of gpu_suite.py: two calls of a few minutes each, and the steps that only `--only` runs.

This module does not need the package, which a call may have to install first.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suite.settings import Case, Settings

INSTALL = 15  # seconds


@dataclass(frozen=True)
class Step:
    """Cases that run in their own process and write the file `name`.jsonl."""

    name: str
    module: str
    cases: str = "cases"
    by: float = float("inf")  # it is ended at this second of its call
    beside: bool = False  # runs beside later steps, until one of these is timed
    timed: bool = False  # no other step runs beside it

    def list_cases(self, settings: Settings) -> list[Case]:
        """Return the cases, the most valuable first."""
        found: list[Case] = getattr(import_module(f"suite.{self.module}"), self.cases)(settings)
        return found


CALLS = {
    # Are the results right, how long is a training step, and where does its time go?
    "first": (
        Step("compile", "ahead", "first_cases", by=80, beside=True),
        Step("facts", "facts", by=25),
        Step("right", "right", by=55),
        Step("miscompiled", "miscompiled", by=80),
        Step("train", "models", "first_cases", by=175, timed=True),
        Step("profile", "profile", by=205, timed=True),
        Step("tests", "checks", by=318),
    ),
    # What failed in the first call, which choices are fastest, and the models that follow these choices.
    "second": (
        Step("compile", "ahead", by=65, beside=True),
        Step("again", "again", by=65),
        Step("ops", "ops", by=125, timed=True),
        Step("blocks", "block_rows", by=225, timed=True),
        Step("dispatch", "proposal", by=250, timed=True),
        Step("models", "models", by=338, timed=True),
    ),
}
# Every op, dtype and candidate, and other memory formats and compilers.
MORE = (
    Step("all-right", "right", "all_cases"),
    Step("sanitizer", "sanitizer"),
    Step("all-ops", "ops", "all_cases", timed=True),
    Step("all-blocks", "block_rows", "all_cases", timed=True),
    Step("all-models", "models", "all_cases", timed=True),
)
STEPS = {step.name: step for step in (*CALLS["first"], *CALLS["second"], *MORE)}
