"""The README's tables are those of the committed rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_shows_the_rows():
    text = (ROOT / "README.md").read_text()
    assert _report().readme_with_numbers(text, ROOT / "benchmarks" / "results") == text


def test_another_number_is_noticed():
    report = _report()
    text = (ROOT / "README.md").read_text()
    number = text.partition(report.BEGIN)[2].partition("**")[2].partition("**")[0]
    assert float(number) > 0
    wrong = text.replace(f"**{number}**", "**9.99**", 1)
    assert report.readme_with_numbers(wrong, ROOT / "benchmarks" / "results") != wrong


def test_missing_markers():
    with pytest.raises(SystemExit, match=r"README\.md must have the lines"):
        _report().readme_with_numbers("nothing", ROOT / "benchmarks" / "results")
