"""The summary at the end: errors come first. It is short enough for the output of a call to stay under 80 lines."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

from memory_traffic.closed_form import PHASES
from memory_traffic.launched import WAYS

from suite import choices, goals
from suite.journal import Journal, Row
from suite.schedule import STEPS

MOST = 70  # lines
WIDTH = 200


def print_summary(out: Path, after: Path | None = None) -> int:
    """Print the summary; return 1 if a test, a check or a process failed. Goals also use the rows of `after`."""
    rows = {step: Journal(out, step).rows() for step in STEPS}
    earlier = {step: Journal(after, step).rows() if after else [] for step in STEPS}
    again = rows["again"]
    lines: list[str] = []
    for title, part in (
        ("machine", _machine(rows["facts"] or earlier["facts"])),
        ("ops at full size", _right([*rows["right"], *rows["all-right"], *again])),
        ("known miscompilations", _miscompiled([*rows["miscompiled"], *again])),
        ("tests", _tests([*rows["tests"], *again])),
        ("sanitizer", _sanitizer(rows["sanitizer"])),
        ("errors", _errors({step: found for step, found in rows.items() if step not in ("tests", "sanitizer")})),
        ("goals", _goals({step: earlier[step] + rows[step] for step in STEPS})),
        ("models, images/s", _models([row for step in ("train", "models", "all-models") for row in rows[step]])),
        ("a training step by kernel", _profile(rows["profile"])),
        ("candidates", _candidates(rows["ops"])),
        ("blocks: the fastest way, and eager time / its time", _blocks(rows["blocks"])),
        ("ops", _ops(rows["all-ops"])),
    ):
        lines += [f"--- {title}", *part] if part else []
    for line in lines[:MOST]:
        print(line[:WIDTH])
    if len(lines) > MOST:
        print(f"... {len(lines) - MOST} more lines; all rows are in {out}")
    wrong = any(row.get("error") or row.get("errors") for found in rows.values() for row in found)
    return int(wrong)


def _columns(cells: list[list[str]]) -> list[str]:
    """Return aligned lines: the first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))] if cells else []
    return [
        "  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in cells
    ]


def _first_line(text: object) -> str:
    return next((line for line in str(text).splitlines() if line.strip()), "")


def _machine(rows: list[Row]) -> list[str]:
    found = {row["case"]: row for row in rows}
    lines = []
    if "machine" in found:
        row = found["machine"]
        versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items() if value)
        lines.append(f"{row['device']}, driver {row['driver']}, {versions}, commit {row['commit']}")
    if "copy_bytes_per_s" in found.get("ceilings", {}):
        row = found["ceilings"]
        lines.append(
            f"copy {row['copy_bytes_per_s'] / 1e12:.3g} TB/s, matmul {row['matmul_flops_per_s'] / 1e12:.3g} TFLOP/s"
        )
    return lines


def _right(rows: list[Row]) -> list[str]:
    counts: Counter[tuple[str, str]] = Counter()
    for row in rows:
        for what in ("right", "wrong"):
            counts["tf32" if row.get("tf32") else str(row.get("dtype")), what] += row.get(what, 0)
    dtypes = dict.fromkeys(dtype for dtype, _ in counts if dtype != "None")
    return [f"{dtype}: {counts[dtype, 'right']} right, {counts[dtype, 'wrong']} wrong" for dtype in dtypes]


def _miscompiled(rows: list[Row]) -> list[str]:
    titles = {"waits": "every wgmma waited for", "eight_warps": "true float32 in eight warps"}
    found = {what: Counter(row[what] for row in rows if what in row) for what in titles}
    return [
        f"{titles[what]}: {counts['right']} right, {counts['wrong']} wrong" for what, counts in found.items() if counts
    ]


def _tests(rows: list[Row], shown: int = 8) -> list[str]:
    by_test: dict[str, Row] = {}
    for row in rows:
        if "test" in row and "error" not in by_test.get(row["test"], {}):
            by_test[row["test"]] = row
    if not any(row["case"] in ("test", "collected", "crash") for row in rows):
        return []
    counts = Counter(row["outcome"] for row in by_test.values())
    collected = max((row["tests"] for row in rows if row["case"] == "collected"), default=0)
    lines = [f"{dict(counts)} of {collected}"]
    failed = [row for row in by_test.values() if row["outcome"] == "failed"]
    for row in failed[:shown]:
        lines.append(f"  {row['test'].removeprefix('tests/')}: {_first_line(row.get('error'))}")
    if len(failed) > shown:
        lines.append(f"  ... {len(failed) - shown} more")
    return lines + [f"  {row['error']}" for row in rows if row["case"] == "crash"]


def _sanitizer(rows: list[Row]) -> list[str]:
    lines = []
    for row in rows:
        if "skipped" in row:
            lines.append(f"{row['case']}: skipped, {row['skipped']}")
        elif "summary" in row:
            ended = "timed out" if row["timed_out"] else f"exit code {row['exit_code']}"
            said = "; ".join(line.strip("= ") for line in row["summary"])
            lines.append(f"{row['case']}: {row['errors']} errors, tests {row['tests']}, {ended}; {said}")
        else:
            lines.append(f"{row['case']}: {_first_line(row.get('error'))}")
    return lines


def _errors(rows: dict[str, list[Row]], shown: int = 9) -> list[str]:
    found: dict[str, list[Row]] = defaultdict(list)
    for step, of_step in rows.items():
        for row in of_step:
            if row.get("error") and row["case"] not in ("test", "crash"):
                what = f"{step} {row.get('op') or row['case']} {row.get('variant') or row.get('backend') or ''}"
                found[what].append(row)
    lines = [
        f"{len(group)} x {what}: {_first_line(group[0].get('name'))[:60]}: {_first_line(group[0]['error'])}"
        for what, group in found.items()
    ]
    return lines[:shown] + ([f"... {len(lines) - shown} more kinds"] if len(lines) > shown else [])


def _ops(rows: list[Row]) -> list[str]:
    timed = [row for row in rows if "median_s" in row]
    by_op: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in timed:
        if row.get("variant") != "candidate":
            by_op[row["op"], row["backend"]].append(row)
    if not timed:
        return []
    cells = [["op", "backend", "calls", "% of bound", "least", "% of copy", "% of matmul"]]
    for (op, backend), group in sorted(by_op.items()):
        bound = [row["percent_of_bound"] for row in group]
        cells.append([
            op, backend, str(len(group)), f"{median(bound):.0f}", f"{min(bound):.0f}",
            f"{median(row['percent_of_copy'] for row in group):.0f}",
            f"{median(row['percent_of_matmul'] for row in group):.0f}",
        ])  # fmt: skip
    lines = _columns(cells)[:40]
    gains = [best["first_over_best"] for best in choices.configs(timed).values() if best["first_over_best"]]
    if gains:
        better = sum(gain > 1.02 for gain in gains)
        lines.append(
            f"candidates: {len(gains)} problems, in {better} another one is over 2% faster than the first; "
            f"first over best: median {median(gains):.2f}, most {max(gains):.2f}"
        )
    return lines


def _candidates(rows: list[Row]) -> list[str]:
    """Return one line per problem."""
    cells = [["problem", "of", "first, ms", "best, ms", "% of bound", "config"]]
    for problem, best in choices.configs(row for row in rows if "median_s" in row).items():
        of = [row for row in rows if row.get("problem") == problem and "median_s" in row]
        fastest = min(of, key=lambda row: row["median_s"])
        first = next((f"{row['median_s'] * 1e3:.3f}" for row in of if row["first"]), "–")
        cells.append([
            problem, str(best["of"]), first, f"{fastest['median_s'] * 1e3:.3f}", f"{fastest['percent_of_bound']:.0f}",
            best["config"],
        ])  # fmt: skip
    return _columns(cells) if len(cells) > 1 else []


def _blocks(rows: list[Row]) -> list[str]:
    """Return one line per block, with a column for each phase and batch."""
    found = choices.blocks(rows)
    timed = [row for row in rows if "median_s" in row]
    batches = sorted({row["shape"][0] for row in timed}, reverse=True)
    columns = [(phase, batch) for phase in PHASES for batch in batches]
    cells = [["block", *(f"{phase} {batch}" for phase, batch in columns)]]
    for name in dict.fromkeys(row["name"] for row in timed):
        line = [name]
        for phase, batch in columns:
            seconds = found.get(f"{name} {phase} batch {batch}", {"seconds": {}})["seconds"]
            ours = {way: s for way, s in seconds.items() if way in WAYS}
            way = min(ours, key=lambda name: ours[name], default=None)
            line.append("–" if way is None else f"{way} {seconds['eager'] / ours[way]:.2f}")
        cells.append(line)
    return _columns(cells) if len(cells) > 1 else []


def _goals(rows: dict[str, list[Row]]) -> list[str]:
    """Return the goals that were measured, and how many were not."""
    table = goals.table(rows)
    found = [cells for cells in table if cells[2] != "not measured"]
    lines = _columns([goals.HEADER, *found]) if found else []
    return [*lines, f"{len(table) - len(found)} of {len(table)} goals were not measured"]


def _profile(rows: list[Row], shown: int = 14) -> list[str]:
    timed = [row for row in rows if row.get("s")]
    cells = [["kernel", "calls", "ms", "% of its floor"]]
    for row in timed[:shown]:
        share = f"{100 * row['floor_s'] / row['s']:.0f}" if row["floor_s"] else "–"
        cells.append([row["kernel"][:60], str(row["calls"]), f"{row['s'] * 1e3:.2f}", share])
    total = sum(row["s"] for row in timed)
    return [*_columns(cells), f"{len(timed)} kernels, {total * 1e3:.1f} ms"] if timed else []


def _models(rows: list[Row], of_line: int = 6) -> list[str]:
    found: dict[tuple[str, str, int, str], dict[str, str]] = defaultdict(dict)
    for row in rows:
        if "images_per_s" in row:
            memory = f" ({row['peak_bytes'] / 2**30:.1f} GiB)" if row["peak_bytes"] else ""
            said = f"{row['variant']} {row['images_per_s']:,.0f}{memory}"
            dtype = "tf32" if row["tf32"] else row["dtype"]
            found[row["name"], row["phase"], row["shape"][0], dtype].setdefault(row["variant"], said)
    lines = []
    for case, variants in found.items():
        said = list(variants.values())
        parts = [", ".join(said[start : start + of_line]) for start in range(0, len(said), of_line)]
        lines += [f"{' '.join(map(str, case))}: {parts[0]}", *(f"    {part}" for part in parts[1:])]
    return lines
