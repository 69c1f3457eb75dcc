"""Curves of train.py as PNG files."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from compare import Comparison, interval95
from outputs import write

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

History = Sequence[dict[str, Any]]
# Okabe and Ito's blue and vermilion, which colour-blind readers can tell apart; dashes show where curves coincide.
COLOUR = {"eager": "#0072B2", "fused": "#D55E00"}
DASH: dict[str, Any] = {"eager": "-", "fused": (0, (4, 2))}


def _axis(axis: Axes, title: str, unit: str) -> None:
    axis.set_title(title, fontsize=11)
    axis.set(xlabel="epoch", ylabel=unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    plt.close(figure)
    write(path, picture.getbuffer())


def _values(history: History, key: str) -> np.ndarray:
    return np.array([row[key] for row in history], dtype=float)


def plot_run(history: History, title: str, path: Path) -> None:
    """Draw training and held-out loss and accuracy of one run over the epochs."""
    epochs = _values(history, "epoch")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for part, colour, label in (("train", "#999999", "training (augmented)"), ("test", "#0072B2", "held out")):
        left.plot(epochs, _values(history, f"{part}_loss"), marker="o", ms=3, color=colour, label=label)
        right.plot(epochs, 100 * _values(history, f"{part}_accuracy"), marker="o", ms=3, color=colour, label=label)
    _axis(left, "Cross-entropy", "loss")
    left.set_yscale("log")
    final = 100 * history[-1]["test_accuracy"]
    _axis(right, f"Accuracy: {final:.2f}% held out at the end", "%")
    left.legend(frameon=False)
    right.legend(frameon=False, loc="lower right")
    figure.suptitle(title)
    _save(figure, path)


def _band(axis: Axes, histories: Sequence[History], key: str, variant: str, scale: float) -> None:
    """Draw the mean over the seeds, with its 95% interval as a band."""
    values = scale * np.stack([_values(h, key) for h in histories])
    epochs, mean = _values(histories[0], "epoch"), values.mean(0)
    label = f"{variant}, mean of {len(histories)} seeds" if len(histories) > 1 else variant
    axis.plot(epochs, mean, color=COLOUR[variant], ls=DASH[variant], lw=1.8, label=label)
    half = np.array([interval95(column.tolist()) or 0.0 for column in values.T])
    if len(histories) > 1:
        low, high = mean - half, mean + half
        if scale == 1:  # a loss on a logarithmic axis: keep the band above the smallest run
            low = np.maximum(low, values.min(0) / 2)
        else:
            high = np.minimum(high, scale)
        axis.fill_between(epochs, low, high, color=COLOUR[variant], alpha=0.18, lw=0, label="its 95% interval")


def plot_compare(
    eager: Sequence[History], fused: Sequence[History], comparison: Comparison, title: str, path: Path
) -> None:
    """Draw held-out loss and accuracy of both variants over the epochs, and the final accuracy of each seed."""
    figure, (loss, accuracy, final) = plt.subplots(
        1, 3, figsize=(14, 4.3), layout="constrained", width_ratios=(1.0, 1.0, 0.9)
    )
    for variant, histories in (("eager", eager), ("fused", fused)):
        _band(loss, histories, "test_loss", variant, 1)
        _band(accuracy, histories, "test_accuracy", variant, 100)
    _axis(loss, "Held-out cross-entropy", "loss")
    loss.set_yscale("log")
    loss.legend(frameon=False)
    _axis(accuracy, "Held-out accuracy", "%")
    low = 100 * min(h[len(h) // 3]["test_accuracy"] for h in [*eager, *fused])
    accuracy.set_ylim(max(0.0, low - 5), 100.4)
    accuracy.legend(frameon=False, loc="lower right")

    ends: dict[float, list[int]] = {}
    for seed, e, f in zip(comparison.seeds, comparison.eager, comparison.fused, strict=True):
        final.plot([0, 1], [100 * e, 100 * f], color="#BBBBBB", lw=1, zorder=1)
        ends.setdefault(f, []).append(seed)
    for f, seeds in ends.items():  # one label for seeds that end together
        final.annotate(f"seed {', '.join(map(str, seeds))}", (1.3, 100 * f), va="center", fontsize=8, color="#666666")
    for x, bar, variant, values in ((0, -0.18, "eager", comparison.eager), (1, 1.18, "fused", comparison.fused)):
        percent = 100 * np.asarray(values, dtype=float)
        final.scatter(np.full(len(percent), x), percent, color=COLOUR[variant], s=22, zorder=2)
        half = interval95(percent.tolist())
        final.errorbar(bar, percent.mean(), yerr=half, fmt="D", ms=5, capsize=4, color=COLOUR[variant])
    _axis(final, "Final held-out accuracy\n(dots: seeds; diamonds: mean, 95% interval)", "%")
    final.set(xticks=[0, 1], xticklabels=["eager", "fused"], xlim=(-0.4, 1.75), xlabel="")
    figure.suptitle(f"{title}\n{comparison.verdict()}", fontsize=12)
    _save(figure, path)
