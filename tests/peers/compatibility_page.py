"""The tables of docs/compatibility.md that are made by programs: each stands between two comments with its name."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compatibility.md"
Row = tuple[str, ...]


def _find(text: str, name: str) -> re.Match[str]:
    found = re.search(rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)", text, re.DOTALL)
    if found is None:
        raise LookupError(f"{PAGE} has no table {name!r}")
    return found


def read(name: str) -> list[Row]:
    """Return the rows of a table, without its heading."""
    lines = [line for line in _find(PAGE.read_text(encoding="utf-8"), name).group().splitlines() if line[:1] == "|"]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines[2:]]


def write(name: str, heading: Row, rows: Sequence[Row], packages: Sequence[str]) -> None:
    """Replace a table, and the line with the versions of the packages that it was made with."""
    lines = [f"| {' | '.join(row)} |" for row in (heading, ("---",) * len(heading), *rows)]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)
    text = PAGE.read_text(encoding="utf-8")
    old = _find(text, name)
    new = "\n".join(["", *lines, "", f"Made with {versions}.", "", ""])
    PAGE.write_text(text[: old.start()] + new + text[old.end() :], encoding="utf-8")
