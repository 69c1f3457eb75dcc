"""The tables of docs/compatibility.md say what is true of the packages that are installed."""

from __future__ import annotations

import compatibility_page
import model_families
import model_tools
import pytest
from model_families import FAMILIES, Family
from model_tools import TOOLS, Tool


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.label)
def test_models(family: Family) -> None:
    if not model_families.installed(family):
        pytest.skip(f"{family.package} is not installed")
    assert model_families.row_of(family) in compatibility_page.read("models")


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.label)
def test_tools(tool: Tool) -> None:
    if not model_tools.installed(tool):
        pytest.skip(f"{tool.package} is not installed")
    assert model_tools.row_of(tool) in compatibility_page.read("tools")


@pytest.mark.parametrize(("name", "entries"), [("models", FAMILIES), ("tools", TOOLS)])
def test_no_row_is_left_over_and_none_fails(name: str, entries: tuple[Family | Tool, ...]) -> None:
    rows = compatibility_page.read(name)
    assert [row[0] for row in rows] == [entry.label for entry in entries]
    assert not any(row[-1] for row in rows), "something does not work"
