"""A pytest plugin for the tests of other packages: every model that torchvision or timm builds in them is fused.

It does that if the environment variable FUSE_MODELS is set. In any case it makes DTYPE the default dtype, runs the
tests whose id the regular expression SELECTED finds, and writes to the file OUTCOMES the outcome of each, and how many
blocks and stems ran fused.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
from torchvision.models import _api as registry

import fusedres
from fusedres.autograd import path_counts

_FUSED = "blocks and stems that ran fused"
_outcomes: dict[str, tuple[str, int]] = {}


def _fused(build: Callable[..., Any]) -> Callable[..., Any]:
    """Return a builder of the same models, fused."""

    @functools.wraps(build)
    def fused(*arguments: Any, **named: Any) -> Any:
        model = build(*arguments, **named)
        if isinstance(model, torch.nn.Module):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="fuse: nothing in")
                fusedres.fuse(model)
        return model

    return fused


def _replace(modules: list[ModuleType], builders: dict[Callable[..., Any], Callable[..., Any]]) -> None:
    """Replace functions wherever a module has them."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in builders:
                setattr(module, name, builders[value])


def _loaded(package: str) -> list[ModuleType]:
    return [module for name, module in sys.modules.items() if f"{name}.".startswith(f"{package}.")]


def pytest_configure() -> None:
    """Replace the builders before the tests import them."""
    torch.set_default_dtype(getattr(torch, os.environ["DTYPE"]))
    if not os.environ["FUSE_MODELS"]:
        return
    builders = {build: _fused(build) for build in registry.BUILTIN_MODELS.values()}
    registry.BUILTIN_MODELS.update({name: builders[build] for name, build in registry.BUILTIN_MODELS.items()})
    _replace(_loaded(torchvision.models.__name__), builders)
    _replace(_loaded(timm.__name__), {timm.create_model: _fused(timm.create_model)})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out the tests that are not selected."""
    selected = re.compile(os.environ["SELECTED"])
    items[:] = [item for item in items if selected.search(item.nodeid)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Count what runs fused in a test."""
    before = path_counts.copy()
    try:
        return (yield)
    finally:
        ran = path_counts - before
        item.user_properties.append((_FUSED, ran["fused_forward"] + ran["stem_forward"]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the outcome of a test; a process of pytest-xdist that crashed counts as a failure."""
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = report.outcome, dict(report.user_properties).get(_FUSED, 0)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the outcomes, in the process that has all of them."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["OUTCOMES"]).write_text(json.dumps(_outcomes), encoding="utf-8")
