"""Plots of benchmark rows: the blocks of one run, or of committed rows speed-up by block, speed and memory of models,
and rooflines.

A committed plot contains a checksum of its rows, so report.py sees when the plot is out of date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# Name → (label, colour). The palette of Okabe and Ito is safe for colour-blind readers.
STYLES = {
    "eager_nchw": ("eager, NCHW", "#999999"),
    "compile": ("torch.compile", "#56B4E9"),
    "fused": ("fused", "#D55E00"),
    "conv_only": ("convolutions alone", "#009E73"),
}
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vP"


def checksum(rows: list[Row]) -> str:
    """Return the checksum of the contents of the rows, in order."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """Return the checksum of the rows that a plot was drawn from; None if there is no plot or no checksum in it."""
    if not path.exists():
        return None
    _, found, rest = path.read_text(encoding="utf-8").partition("rows sha256 ")
    return rest[:64] if found else None


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install '.[bench]'") from error

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fusedres"  # so that the same rows give the same file
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"Description": f"rows sha256 {checksum(rows)}"} | ({"Date": None} if path.suffix == ".svg" else {})
    figure.savefig(path, dpi=120, metadata=about)
    _pyplot().close(figure)


def is_ours(row: Row) -> bool:
    """Whether a row is of this package: it has the arguments of fuse()."""
    return row.get("conv") is not None


def latest(rows: list[Row], kind: str | None = None) -> dict[tuple, Row]:
    """Return (name, phase, batch, dtype, variant) → its latest row; only rows of cases of `kind`, if given."""
    of_kind = (row for row in rows if kind is None or row.get("kind", "plain") == kind)
    ordered = sorted(of_kind, key=lambda row: row["date"])
    return {(row["name"], row["phase"], row["shape"][0], dtype_of(row), row["variant"]): row for row in ordered}


def machine_of(row: Row) -> str:
    """Return the device, of a CPU with the instruction sets that make a difference."""
    return f"{row['device']} with {row['isa']}" if row.get("isa") else str(row["device"])


def _about(rows: list[Row]) -> str:
    last = max(rows, key=lambda row: row["date"])
    return f"{machine_of(last)}\ntorch {last['versions']['torch']}, {last['date'][:10]}"


# --- committed rows ---------------------------------------------------------------------------------------------------


def speedup(rows: list[Row], path: Path) -> None:
    """Plot eager time / fused time of the fastest way for each block; left of 1 fused is slower."""
    pyplot = _pyplot()
    cases: dict[tuple, dict[str, Row]] = {}
    for (*case, variant), row in latest(rows, "plain").items():
        cases.setdefault(tuple(case), {})[variant] = row
    names = sorted({key[0] for key in cases}, key=lambda name: (name == "stem", name))
    series = sorted({key[2:] for key in cases})
    phases = [phase for phase in ("train", "infer") if any(key[1] == phase for key in cases)]
    height = 1.5 + 0.16 * len(names) * (len(series) + 1)
    figure, axes = pyplot.subplots(
        1, len(phases), figsize=(4.6 * len(phases) + 1.2, height), squeeze=False, sharey=True
    )
    for axis, phase in zip(axes[0], phases, strict=True):
        least = 0.8
        for position, name in enumerate(names):
            for k, (batch, dtype) in enumerate(series):
                found = cases.get((name, phase, batch, dtype), {})
                at = position + 0.62 * ((k + 0.5) / len(series) - 0.5)
                if "conv_only" in found:
                    axis.plot(found["conv_only"]["ratio"]["median"], at, "|", color="#666666", markersize=9, zorder=2)
                fused = [row["ratio"] for row in found.values() if is_ours(row)]
                if fused:
                    ratio = max(fused, key=lambda ratio: ratio["median"])
                    least = min(least, 0.95 * ratio["low"])
                    spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
                    axis.errorbar(
                        ratio["median"], at, xerr=spread, fmt=MARKERS[k % len(MARKERS)], markersize=5, lw=1.2, zorder=3,
                        color=COLOURS[k % len(COLOURS)],
                    )  # fmt: skip
        axis.axvline(1, color="black", lw=1)
        axis.axvspan(0, 1, color="#f2e6e0", zorder=0)
        axis.set_xlim(left=least)
        axis.set_title("training step" if phase == "train" else "inference", fontsize=10)
        axis.set_xlabel("eager channels_last / fused, 95% interval; right of 1 is faster", fontsize=8)
        axis.grid(axis="y", color="#dddddd", lw=0.6)
        axis.set_axisbelow(True)
    axes[0][0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    several = len({dtype for _, dtype in series}) > 1
    for k, (batch, dtype) in enumerate(series):
        label = f"batch {batch}" + (f", {dtype}" if several else "")
        axes[0][0].plot([], [], MARKERS[k % len(MARKERS)], color=COLOURS[k % len(COLOURS)], label=label)
    axes[0][0].plot([], [], "|", color="#666666", markersize=9, label="convolutions alone")
    dtypes = ", ".join(sorted({dtype for _, dtype in series}))
    figure.suptitle(f"Speed-up by block: {_about(rows)}, {dtypes}", fontsize=10)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1))
    _save(figure, path, rows)


def dtype_of(row: Row) -> str:
    """Return the dtype, of float32 also whether products are rounded."""
    return "tf32" if row.get("tf32") else row["dtype"]


def roofline(rows: list[Row], path: Path) -> None:
    """Plot achieved FLOP/s of each op against its arithmetic intensity, with the measured ceilings of the machine."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 5.2))
    names = sorted({_op(row) for row in rows})
    for k, name in enumerate(names):
        of_op = [row for row in rows if _op(row) == name]
        x = [row["flops"] / row["counted_bytes"] for row in of_op]
        y = [row["flops_per_s"] for row in of_op]
        marker = MARKERS[(k // len(COLOURS)) % len(MARKERS)]
        axis.plot(x, y, marker, color=COLOURS[k % len(COLOURS)], markersize=5, alpha=0.75, label=name, mec="none")
    copy = max(row["copy_bytes_per_s"] for row in rows)
    product = max(row["matmul_flops_per_s"] for row in rows)
    low = min(row["flops"] / row["counted_bytes"] for row in rows) / 2
    high = max(4 * product / copy, 2 * max(row["flops"] / row["counted_bytes"] for row in rows))
    label = f"copy {_rate(copy, 'B/s')},\nproduct {_rate(product, 'FLOP/s')}"
    axis.plot([low, product / copy, high], [low * copy, product, product], color="black", lw=1.2, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP / byte moved")
    axis.set_ylabel("achieved FLOP/s")
    axis.grid(color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    figure.suptitle(f"Roofline: {_about(rows)}, {rows[0]['dtype']}, largest measured ceilings", fontsize=10)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7.5, frameon=False)
    figure.tight_layout()
    _save(figure, path, rows)


def _op(row: Row) -> str:
    backend = f" ({row['backend']})" if row["backend"] in ("triton", "cuda") else ""
    return f"{row['op']} {row['variant'] or ''}".strip() + backend


def _rate(value: float, unit: str) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


_SHORT = 0.35  # of eager's bar: a label does not fit into a shorter one

# What the picture of models shows, as far as it was measured: variant → label, colour of the bar and of its text.
SHOWN = {
    "eager": ("eager PyTorch, channels_last", "#bbbbbb", "black"),
    "compile": ("torch.compile", "#56B4E9", "black"),
    "compile freezing": ("torch.compile, freezing", "#9AD0F0", "black"),
    "openvino": ("OpenVINO", "#E8D44D", "black"),
    "onnxruntime": ("onnxruntime", "#B8A200", "black"),
    "library": ("fused", "#C04F00", "white"),
    "frozen": ("fused, frozen", "#7A3200", "white"),
    "library min": ('fused, memory="min"', "#0072B2", "white"),
    "fused": ('fused, conv="fused"', "#00795A", "white"),
    "fused min": ('fused, conv="fused", memory="min"', "#CC79A7", "black"),
}


def models(rows: list[Row], path: Path) -> None:
    """Plot speed and memory of whole models, relative to eager, as bars.

    The memory is the peak of a training step if it is known, else what is saved for backward.
    """
    pyplot = _pyplot()
    key = "peak_bytes" if any(row["peak_bytes"] for row in rows) else "saved_bytes"
    cases: dict[tuple, dict[str, Row]] = {}
    for (name, phase, batch, dtype, variant), row in latest(rows).items():
        if variant in SHOWN:
            cases.setdefault((name, phase, batch, dtype), {})[variant] = row
    cases = {case: found for case, found in cases.items() if "eager" in found}
    training = {
        case: {variant: row for variant, row in found.items() if row[key]}
        for case, found in cases.items() if case[1] == "train" and found["eager"][key]
    }  # fmt: skip
    bars = [sum(len(found) + 1 for found in shown.values()) for shown in (cases, training)]
    height = 1.8 + 0.27 * max(bars)
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(11, height))
    several = len({case[2:] for case in cases}) > 1
    _bars(speed, cases, several, lambda row, _: row["ratio"], lambda row: f"{number(row['images_per_s'])} images/s")
    _bars(
        memory, training, several, lambda row, eager: {"median": row[key] / eager[key]},
        lambda row: f"{number(row[key] / 1e6)} MB",
    )  # fmt: skip
    speed.set_title("Speed relative to eager, 95 % interval\n(longer is better)", fontsize=11)
    what = "Peak memory of training" if key == "peak_bytes" else "Memory kept for backward"
    memory.set_title(f"{what}, relative to eager\n(shorter is better)", fontsize=11)
    _, _, batch, dtype = next(iter(cases))
    about = "" if several else f", batch {batch}, {dtype}"
    figure.suptitle(f"Whole models: {_about(rows)}{about}", fontsize=11, y=1 - 0.12 / height, va="top")
    drawn = dict.fromkeys(variant for found in cases.values() for variant in found)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=SHOWN[variant][1]) for variant in SHOWN if variant in drawn]
    labels = [SHOWN[variant][0] for variant in SHOWN if variant in drawn]
    figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 5), fontsize=10, frameon=False)
    limits = max((axis.get_ylim() for axis in (speed, memory)), key=lambda ends: abs(ends[0] - ends[1]))
    for axis in (speed, memory):
        axis.set_ylim(limits)  # all bars are equally thick
    figure.tight_layout(rect=(0, (0.4 if len(labels) <= 5 else 0.6) / height, 1, 1 - 0.5 / height))
    _save(figure, path, rows)


def _bars(
    axis: Any,
    cases: dict[tuple, dict[str, Row]],
    several: bool,
    ratio_of: Callable[[Row, Row], dict[str, float]],
    text: Callable[[Row], str],
) -> None:
    """Draw a group of bars for each case; a bar's length is the ratio of its row to that of eager.

    The bar of eager has the absolute number. Several: the label of a case has its batch and dtype.
    """
    position, ticks = 0, []
    for (name, phase, batch, dtype), found in cases.items():
        what = f"{name}\n{'training' if phase == 'train' else 'inference'}"
        ticks.append((position + (len(found) - 1) / 2, f"{what}, batch {batch}, {dtype}" if several else what))
        for variant in filter(found.__contains__, SHOWN):
            ratio = ratio_of(found[variant], found["eager"])
            _, colour, ink = SHOWN[variant]
            axis.barh(position, ratio["median"], 0.9, color=colour)
            label = text(found[variant]) if variant == "eager" else f"{ratio['median']:.2f} × eager"
            short = ratio["median"] < _SHORT  # the label stands beside the bar
            at, color = (ratio["median"] + 0.02, "black") if short else (0.02, ink)
            axis.text(at, position, label, va="center", fontsize=9.5, color=color)
            if variant != "eager" and "low" in ratio:
                spread = [[ratio["median"] - ratio["low"]], [ratio["high"] - ratio["median"]]]
                axis.errorbar(ratio["median"], position, xerr=spread, color="black", lw=1.2, capsize=2)
            position += 1
        position += 1
    axis.axvline(1, color="black", lw=1)
    axis.set_yticks([at for at, _ in ticks], [label for _, label in ticks], fontsize=10)
    axis.set_ylim(position - 1.4, -0.6)
    axis.set_xticks([])
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


# Kind of rows → the name of its plot, and the function that draws it.
KINDS: dict[str, tuple[str, Callable[[list[Row], Path], None]]] = {
    "blocks": ("speedup", speedup),
    "models": ("models", models),
    "ops": ("roofline", roofline),
}


# --- one run ----------------------------------------------------------------------------------------------------------


def plot_blocks(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the time of each block relative to eager channels_last, and bytes saved for backward if there are any."""
    plt = _pyplot()
    cases: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in rows:
        cases.setdefault((r["name"], r["phase"], r["shape"][0]), {})[r["variant"]] = r
    labels = [f"{name}\n{phase}, batch {batch}" for name, phase, batch in cases]
    saving = [key for key in cases if cases[key]["eager"]["saved_bytes"]]
    names = [n for n in STYLES if any(n in variants for variants in cases.values())]
    height = 1.8 + 0.26 * len(cases) * (len(names) + 1)
    figure, axes = plt.subplots(
        1, 2 if saving else 1, figsize=(12 if saving else 8, height), squeeze=False, sharey=True
    )
    times = axes[0][0]
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        label, colour = STYLES[name]
        for position, variants in enumerate(cases.values()):
            r, base = variants.get(name), variants["eager"]["median_s"]
            if r is None:
                continue
            value = r["median_s"] / base
            at = position + (k - (len(names) - 1) / 2) * width
            spread = [[value - r["p20_s"] / base], [r["p80_s"] / base - value]]
            times.barh(at, value, width * 0.92, color=colour, xerr=spread, ecolor="#333333", error_kw={"lw": 0.8})
            text = f"{value:.2f}"
            times.text(0.02, at, text, va="center", fontsize=7, color="white", fontweight="bold")
        times.barh([0], [0], color=colour, label=label)
    times.axvline(1, color="black", lw=1)
    times.set_xlabel("time / eager channels_last (median; bars: 20-80 %), less is better")
    times.set_yticks(range(len(cases)), labels, fontsize=8)
    times.set_ylim(len(cases) - 0.4, -0.6)
    if saving:
        memory = axes[0][1]
        for position, variants in enumerate(cases.values()):
            eager, ours = variants["eager"]["saved_bytes"], variants["fused"]["saved_bytes"]
            if eager:
                memory.barh(position, ours / eager, 0.6, color=STYLES["fused"][1])
                text = f"{ours / 1e6:.3g} of {eager / 1e6:.3g} MB"
                memory.text(0.02, position, text, va="center", fontsize=8, color="white", fontweight="bold")
        memory.axvline(1, color="black", lw=1)
        memory.set_xlabel("saved for backward / eager")
    first = rows[0]
    figure.suptitle(f"{machine_of(first)}, {first['dtype']}, torch {first['versions']['torch']}", fontsize=10)
    figure.legend(*times.get_legend_handles_labels(), loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    _save(figure, path, rows)
