"""Plots of benchmark rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Name → (label, colour); Okabe and Ito's palette, which the colour-blind can tell apart.
STYLES = {
    "eager_nchw": ("eager, NCHW", "#999999"),
    "compile": ("torch.compile", "#56B4E9"),
    "fused": ("fused", "#D55E00"),
    "conv_only": ("convolutions alone", "#009E73"),
}


def plot_blocks(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws each block's time relative to eager channels_last, and bytes saved for backward where there are any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
    figure.suptitle(f"{first['device']}, {first['dtype']}, torch {first['versions']['torch']}", fontsize=10)
    figure.legend(*times.get_legend_handles_labels(), loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.35 / height, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
