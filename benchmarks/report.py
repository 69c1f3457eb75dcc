"""Writes the tables of README.md and docs/numbers.md, and the plots, from the rows in benchmarks/results/*.json.

python benchmarks/report.py             rewrite both documents between their markers, and the plots of changed rows
python benchmarks/report.py --check     exit 1 if a document or a plot differs from the rows
python benchmarks/report.py --add DIR   first add the rows of a run of gpu_suite.py to results: one file per step
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from common.terminal import begin, run

if __name__ == "__main__":
    begin()  # before the imports that take long

from reporting import plots
from reporting.plots import Row
from reporting.tables import blocks_table, goals_table, models_table, ops_table

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- numbers: benchmarks/report.py -->", "<!-- end of numbers -->"
LARGEST = 16 << 20  # bytes of a results file
BLOCKS = ("basic_block", "bottleneck", "stem", "design")
TABLES = {"blocks": blocks_table, "models": models_table, "ops": ops_table}
CAPTIONS = {"blocks": "Speed-up by block", "models": "Speed and memory of whole models", "ops": "Roofline of each op"}


def kind_of(row: Row) -> str | None:
    """Return blocks, models or ops; None if the row is no measurement of these."""
    if not row.get("median_s") or row.get("variant") in ("candidate", "product alone"):
        return None
    return "models" if row["op"] == "model" else "blocks" if row["op"] in BLOCKS else "ops"


def slug(machine: str) -> str:
    """Return the name of a machine as it is used in file names."""
    return re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def load(results: Path) -> dict[str, list[Row]]:
    """Return the name of each results file → its rows."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("*.json"))}


def measured(files: dict[str, list[Row]]) -> dict[str, dict[str, list[list[Row]]]]:
    """Return kind → machine → one list of rows per results file."""
    found: dict[str, dict[str, list[list[Row]]]] = {kind: {} for kind in TABLES}
    for rows in files.values():
        by_kind: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            if (kind := kind_of(row)) and not _repeats(row):
                by_kind[kind, plots.machine_of(row)].append(row)
        for (kind, machine), of_file in by_kind.items():
            found[kind].setdefault(machine, []).append(of_file)
    return found


def _repeats(row: Row) -> bool:
    """Whether a row measures the computation of another one again: memory="min" changes only training."""
    return row.get("memory") == "min" and row["phase"] == "infer"


def wanted_plots(found: dict[str, dict[str, list[list[Row]]]]) -> dict[str, tuple[str, list[Row]]]:
    """Return the name of each plot → its kind and rows, if there is something to draw."""
    wanted = {}
    for kind, (name, _) in plots.KINDS.items():
        for machine, groups in found[kind].items():
            rows = [row for rows in groups for row in rows]
            if kind == "ops":
                rows = [row for row in rows if row.get("flops") and row.get("matmul_flops_per_s")]
            if kind == "models":
                wanted |= {f"{slug(machine)}-{end}.svg": (kind, part) for end, part in _models(rows, name).items()}
            elif rows:
                wanted[f"{slug(machine)}-{name}.svg"] = (kind, rows)
    return wanted


def _models(rows: list[Row], name: str) -> dict[str, list[Row]]:
    """Return the rows of each picture of models by the end of its name: a picture for each dtype."""
    by_dtype: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_dtype[plots.dtype_of(row)].append(row)
    found = {name if len(by_dtype) == 1 else f"{name}-{dtype}": part for dtype, part in by_dtype.items()}
    return {end: part for end, part in found.items() if any(row["peak_bytes"] or row["saved_bytes"] for row in part)}


def section(results: Path, kinds: Iterable[str] = TABLES, folder: str | None = "../benchmarks/results") -> str:
    """Return the plots and tables of these kinds; folder: path of the plots from the document, None: only tables."""
    files = load(results)
    found = measured(files)
    drawn = wanted_plots(found)
    parts = [goals_table(files.values())]
    for kind in kinds:
        parts += [
            f"![{CAPTIONS[kind]}, {plots.machine_of(rows[0])}]({folder}/{name})"
            for name, (of, rows) in drawn.items() if of == kind and folder is not None
        ]  # fmt: skip
        parts += [_folded(TABLES[kind](rows)) for groups in found[kind].values() for rows in groups]
    return "\n\n".join(filter(None, parts))


def summary(results: Path) -> str:
    """Return the README's numbers: whole models, in a table, as their plot is on its first screen."""
    return section(results, ("models",), None)


def _folded(table: str, longest: int = 20) -> str:
    """Return a long table folded: only its first line shows until a click opens it."""
    if table.count("\n") <= longest:
        return table
    title, _, rest = table.partition("\n")
    return f"<details><summary>{title.rstrip(':')}</summary>\n{rest}\n\n</details>"


def with_numbers(text: str, numbers: str) -> str:
    """Return the text of a document with these numbers between its markers."""
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise SystemExit(f"a document with numbers must have the lines {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{numbers}\n\n{END}{after}"


# The documents with numbers, and what each shows.
DOCUMENTS = {ROOT / "README.md": summary, ROOT / "docs" / "numbers.md": section}


def outdated_plots(results: Path) -> list[str]:
    """Return the plots that are missing, were drawn from other rows, or have no rows any more."""
    wanted = wanted_plots(measured(load(results)))
    wrong = [name for name, (_, rows) in wanted.items() if plots.drawn_from(results / name) != plots.checksum(rows)]
    return wrong + [path.name for path in sorted(results.glob("*.svg")) if path.name not in wanted]


def draw(results: Path) -> None:
    """Draw the outdated plots, and remove plots that have no rows any more."""
    wanted = wanted_plots(measured(load(results)))
    for name in outdated_plots(results):
        if name in wanted:
            kind, rows = wanted[name]
            plots.KINDS[kind][1](rows, results / name)
        else:
            (results / name).unlink()


def add(folder: Path, results: Path) -> list[Path]:
    """Write the rows of a run of gpu_suite.py as results files, one for each device and step; return their paths."""
    from common.rows import ROW_KEYS
    from suite.journal import Journal

    steps = sorted(path.stem for path in folder.glob("*.jsonl"))
    if not steps:
        raise SystemExit(f"--add: {folder} holds no rows of gpu_suite.py; expected files STEP.jsonl")
    by_step = {step: Journal(folder, step).rows() for step in steps}
    if any(str(row.get("name", "")).startswith("tiny") for rows in by_step.values() for row in rows):
        raise SystemExit(f"--add: {folder} is a run with --tiny, whose toy shapes are no results")
    usual = next((row["device"] for rows in by_step.values() for row in rows if "device" in row), "unknown")
    written = []
    for step, rows in by_step.items():
        by_device: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            whole = dict.fromkeys(ROW_KEYS) if "median_s" in row else {}
            by_device[row.get("device", usual)].append(whole | row)
        for device, of_device in by_device.items():
            path = results / f"{slug(device)}-{step}.json"
            path.write_text(_fitting(of_device), encoding="utf-8")
            written.append(path)
    return written


def _fitting(rows: list[Row]) -> str:
    """Return the rows as JSON, one per line; without the rows of candidates if the file would be too large."""
    text = _text(rows)
    if len(text.encode()) > LARGEST:
        text = _text(row for row in rows if row.get("variant") != "candidate")
    if len(text.encode()) > LARGEST:
        raise SystemExit(f"--add: the rows take {len(text.encode())} bytes, more than the {LARGEST} of a results file")
    return text


def _text(rows: Iterable[Row]) -> str:
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the documents and the plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if something is out of date")
    parser.add_argument("--add", type=Path, metavar="DIR", help="the --out of a run of gpu_suite.py")
    options = parser.parse_args(argv)
    results = ROOT / "benchmarks" / "results"
    if options.add:
        for path in add(options.add, results):
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
    texts = {path: with_numbers(path.read_text(), numbers(results)) for path, numbers in DOCUMENTS.items()}
    if options.check:
        return int(any(path.read_text() != text for path, text in texts.items()) or bool(outdated_plots(results)))
    draw(results)
    for path, text in texts.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(run(main, "report.py"))
