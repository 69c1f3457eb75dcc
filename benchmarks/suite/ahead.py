"""Run torch.compile for the models that are timed later, in a process beside the steps that time nothing."""

from __future__ import annotations

from functools import partial

from suite import models
from suite.settings import Case, Settings


def first_cases(settings: Settings) -> list[Case]:
    """Return the case of a training step of ResNet-50."""
    return cases(settings)[:1]


def cases(settings: Settings) -> list[Case]:
    """Return the cases of every model in both phases."""
    return [
        Case(f"{work.model} {work.phase}", partial(models.compile_ahead, settings, work), 90)
        for work in models.works(settings)
    ]
