"""The tables of README.md and docs/numbers.md, as Markdown, from rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median

from suite import goals

from reporting.plots import Row, is_ours, machine_of, number

NONE = "–"


def _markdown(header: list[str], cells: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _heading(what: str, rows: list[Row]) -> str:
    """Return the line that says on which machine, with which versions and when the rows were measured."""
    first = rows[0]
    dtypes = " and ".join(sorted({_dtype(row) for row in rows}))
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    rounds = [row["rounds"] for row in rows]
    spread = f"{min(rounds)}" if min(rounds) == max(rounds) else f"{min(rounds)} to {max(rounds)}"
    synthetic = ", synthetic data" if first.get("data") == "synthetic" else ""
    return (
        f"{what} on {machine_of(first)}, {dtypes}, torch {first['versions']['torch']}, {first['date'][:10]}, "
        f"commit {commits}, {spread} interleaved rounds{synthetic}:"
    )


def _dtype(row: Row) -> str:
    return "TF32" if row.get("tf32") else row["dtype"]


def _ratio(row: Row) -> str:
    ratio = row["ratio"]
    return f"**{ratio['median']:.2f}** ({ratio['low']:.2f}–{ratio['high']:.2f})"


def _change(eager: Row, fused: Row, key: str) -> str:
    """Return the megabytes of eager → those of the fused way."""
    if not eager.get(key) or not fused.get(key):
        return NONE
    return f"{number(eager[key] / 1e6)} → {number(fused[key] / 1e6)}"


def _grouped(rows: list[Row]) -> dict[tuple, dict[str, Row]]:
    """Return (name, phase, batch, dtype) → variant → its first row."""
    cases: dict[tuple, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        cases[row["name"], row["phase"], row["shape"][0], _dtype(row)].setdefault(row["variant"], row)
    return {case: found for case, found in cases.items() if "eager" in found and _fastest(found, True)}


def _fastest(found: dict[str, Row], ours: bool, graphed: bool = False) -> Row | None:
    """Return the fastest fused row (`ours`) or the fastest rival; only rows in CUDA graphs, or only rows without."""
    plain = ("eager", "eager_nchw", "conv_only")
    rows = [
        row
        for variant, row in found.items()
        if is_ours(row) is ours and variant not in plain and variant.startswith("graphed ") is graphed
    ]
    return max(rows, key=lambda row: row["ratio"]["median"], default=None)


def _in_graphs(found: dict[str, Row]) -> str:
    """Return the speed-up of fused over the fastest rival, both in CUDA graphs."""
    fused, rival = _fastest(found, True, graphed=True), _fastest(found, False, graphed=True)
    if fused is None or rival is None:
        return NONE
    return f"{fused['ratio']['median'] / rival['ratio']['median']:.2f} over {rival['variant'].removeprefix('graphed ')}"


def _columns(header: list[str], cells: list[list[str]], always: tuple[str, ...]) -> str:
    """Return a Markdown table without empty columns; those in `always` stay."""
    kept = [k for k, name in enumerate(header) if name in always or any(line[k] != NONE for line in cells)]
    return _markdown([header[k] for k in kept], [[line[k] for k in kept] for line in cells])


def blocks_table(rows: list[Row]) -> str:
    """Return the table of blocks: the fastest fused way, eager, the convolutions alone, and the fastest rival."""
    cases = _grouped(rows)
    several = len({dtype for *_, dtype in cases}) > 1
    ways = {row["variant"] for row in rows if is_ours(row)}
    header = [
        "block", "phase", "batch", "dtype", "eager NCHW ms", "eager ms", "convolutions ms", "fused ms", "way",
        "eager / fused (95%)", "fastest rival", "eager / it (95%)", "in CUDA graphs", "saved MB, eager → fused",
    ]  # fmt: skip
    cells = []
    for (name, phase, batch, dtype), found in cases.items():
        eager, fused, rival = found["eager"], _fastest(found, True), _fastest(found, False)
        times = [found.get(variant) for variant in ("eager_nchw", "eager", "conv_only")] + [fused]
        cells.append([
            name, phase, str(batch), dtype if several else NONE,
            *(number(row["median_s"] * 1e3) if row else NONE for row in times),
            fused["variant"] if len(ways) > 1 else NONE, _ratio(fused),
            rival["variant"] if rival else NONE, _ratio(rival) if rival else NONE, _in_graphs(found),
            _change(eager, fused, "saved_bytes"),
        ])  # fmt: skip
    return f"{_heading('Blocks', rows)}\n\n{_columns(header, cells, ('saved MB, eager → fused',))}"


def models_table(rows: list[Row]) -> str:
    """Return the table of models: images per second of eager and of the fastest fused way."""
    cases = _grouped(rows)
    several = len({dtype for *_, dtype in cases}) > 1
    header = [
        "model", "phase", "batch", "dtype", "eager NCHW images/s", "eager images/s", "fused images/s", "way",
        "eager / fused (95%)", "fastest rival", "eager / it (95%)", "in CUDA graphs", "fused, % of its bound",
        "peak MB, eager → fused", "saved MB, eager → fused", "moved MB, eager → fused",
    ]  # fmt: skip
    cells = []
    for (name, phase, batch, dtype), found in cases.items():
        eager, fused, rival = found["eager"], _fastest(found, True), _fastest(found, False)
        speeds = [found.get("eager_nchw"), eager, fused]
        bound = fused.get("percent_of_bound")
        cells.append([
            name, phase, str(batch), dtype if several else NONE,
            *(number(row["images_per_s"]) if row else NONE for row in speeds), fused["variant"], _ratio(fused),
            rival["variant"] if rival else NONE, _ratio(rival) if rival else NONE, _in_graphs(found),
            f"{bound:.0f}" if bound else NONE,
            *(_change(eager, fused, key) for key in ("peak_bytes", "saved_bytes", "counted_bytes")),
        ])  # fmt: skip
    return f"{_heading('Models', rows)}\n\n{_columns(header, cells, ())}"


def ops_table(rows: list[Row]) -> str:
    """Return the table of ops: bound / time over all shapes, where the bound follows from bytes and arithmetic."""
    by_op: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("percent_of_bound") is not None:
            by_op[f"{row['op']} {row['variant'] or ''}".strip(), row["backend"]].append(row)
    cells = []
    for (op, backend), found in by_op.items():
        shares = [row["percent_of_bound"] for row in found]
        worst = min(found, key=lambda row: row["percent_of_bound"])
        rate = median(row["bytes_per_s"] for row in found) / 1e9
        cells.append([
            op, backend, str(len(found)), f"{median(shares):.0f}", f"{min(shares):.0f}", _shape(worst),
            f"{max(shares):.0f}", f"{rate:.3g}",
        ])  # fmt: skip
    header = ["op", "backend", "shapes", "% of its bound: median", "least", "at", "most", "GB/s, median"]
    return f"{_heading('Ops', rows)}\n\n{_markdown(header, cells)}"


def _shape(row: Row) -> str:
    return "x".join(map(str, row["shape"])) if row.get("shape") else NONE


def goals_table(files: Iterable[list[Row]]) -> str:
    """Return the goals and what the rows of an H100 or H200 reached; empty if there are no such rows."""
    rows = [row for found in files for row in found if any(name in row.get("device", "") for name in goals.DEVICES)]
    by_step: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_step[row.get("step", "")].append(row)
    if not by_step["models"] and not by_step["ops"]:
        return ""
    return "Goals:\n\n" + _markdown(goals.HEADER, goals.table(by_step))
