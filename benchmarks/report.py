"""Writes the README's tables from the rows in benchmarks/results/*.json, so that no number is typed by hand.

python benchmarks/report.py            rewrites README.md between its markers
python benchmarks/report.py --check    exit 1 if the README and the rows differ
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers: benchmarks/report.py -->", "<!-- end of numbers -->"

Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """One results file as a Markdown table, fused against the other variants of the same block and phase."""
    measured = {(row["name"], row["phase"], row["shape"][0], row["variant"]): row for row in rows}
    first = rows[0]
    versions = first["versions"]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    lines = [
        f"{first['device']}, {first['dtype']}, torch {versions['torch']}, {first['date'][:10]}, commit {commits}, "
        f"{min(row['rounds'] for row in rows)} to {max(row['rounds'] for row in rows)} interleaved rounds:",
        "",
        "| block | phase | batch | eager NCHW ms | eager ms | convolutions ms | fused ms | eager / fused (95%) "
        "| saved MB, eager → fused |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, phase, batch, variant), fused in measured.items():
        if variant != "fused":
            continue
        nchw, eager, convs = (measured[name, phase, batch, other] for other in ("eager_nchw", "eager", "conv_only"))
        times = " | ".join(f"{row['median_s'] * 1e3:.3g}" for row in (nchw, eager, convs, fused))
        ratio = fused["ratio"]
        saved = f"{eager['saved_bytes'] / 1e6:.3g} → {fused['saved_bytes'] / 1e6:.3g}" if phase == "train" else "–"
        lines.append(
            f"| {name} | {phase} | {batch} | {times} | **{ratio['median']:.2f}** "
            f"({ratio['low']:.2f}–{ratio['high']:.2f}) | {saved} |"
        )
    return "\n".join(lines)


def readme_with_numbers(text: str, results: Path) -> str:
    """The README's text with the tables of every results file between its markers."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"README.md must have the lines {BEGIN!r} and {END!r}")
    tables = [table(json.loads(path.read_text())) for path in sorted(results.glob("*.json"))]
    return f"{before}{BEGIN}\n\n" + "\n\n".join(tables) + f"\n\n{END}{after}"


def main() -> int:
    """Rewrites or checks the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = readme_with_numbers(old, ROOT / "benchmarks" / "results")
    if check:
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
