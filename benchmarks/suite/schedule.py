"""What gpu_suite.py runs: two calls of a few minutes each, and what `--only` alone gets.

Nothing here needs the package, which a call may have to install first.
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
    """Cases in a process of their own, which write the file `name`.jsonl."""

    name: str
    module: str
    cases: str = "cases"
    by: float = float("inf")  # the second of its call at which it is ended
    beside: bool = False  # runs beside those behind it until one is timed
    timed: bool = False  # nothing else runs beside it

    def list_cases(self, settings: Settings) -> list[Case]:
        """Most valuable first."""
        found: list[Case] = getattr(import_module(f"suite.{self.module}"), self.cases)(settings)
        return found


CALLS = {
    # whether it is right, what a training step takes, and where its time goes
    "first": (
        Step("compile", "ahead", "first_cases", by=80, beside=True),
        Step("facts", "facts", by=25),
        Step("right", "right", by=55),
        Step("miscompiled", "miscompiled", by=80),
        Step("train", "models", "first_cases", by=175, timed=True),
        Step("profile", "profile", by=205, timed=True),
        Step("tests", "checks", by=318),
    ),
    # what failed in the first, which choices are fastest, and the models that follow them
    "second": (
        Step("compile", "ahead", by=65, beside=True),
        Step("again", "again", by=65),
        Step("ops", "ops", by=125, timed=True),
        Step("blocks", "block_rows", by=225, timed=True),
        Step("dispatch", "proposal", by=250, timed=True),
        Step("models", "models", by=338, timed=True),
    ),
}
# Every op and dtype, each candidate, other memory formats and compilers.
MORE = (
    Step("all-right", "right", "all_cases"),
    Step("sanitizer", "sanitizer"),
    Step("all-ops", "ops", "all_cases", timed=True),
    Step("all-blocks", "block_rows", "all_cases", timed=True),
    Step("all-models", "models", "all_cases", timed=True),
)
STEPS = {step.name: step for step in (*CALLS["first"], *CALLS["second"], *MORE)}
