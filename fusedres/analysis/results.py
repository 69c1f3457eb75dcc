"""What every experiment returns: data, a conclusion computed from them, and a picture."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fusedres import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito, which colour-blind readers can tell apart: for curves in order.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DOTS_PER_INCH = 110


class AnalysisError(ValueError):
    """What was asked for cannot be done; the message is one sentence and says what to do instead."""


def needed(module: str) -> Any:
    """Return a module of the extra `analysis`.

    Raises: AnalysisError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise AnalysisError(f"analyze needs {package}: pip install 'fusedres[analysis]'") from error


class Result(ABC):
    """The base of the dataclasses that the experiments return.

    Attributes:
        name: of the experiment, as the command has it.
        title: of the experiment, for people.
        size: of the picture, in inches.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    size: ClassVar[tuple[float, float]] = (12.0, 4.4)

    @abstractmethod
    def conclusion(self) -> str:
        """Return what the numbers say, in a few sentences."""

    @abstractmethod
    def draw(self, figure: Figure) -> None:
        """Draw the numbers into an empty figure."""

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; numbers that are not finite become None."""
        values = _as_json(dataclasses.asdict(self))  # type: ignore[call-overload]
        return {"experiment": self.name, "conclusion": self.conclusion(), **values}

    def png(self) -> bytes:
        """Return the picture."""
        figure = needed("matplotlib.figure").Figure(self.size, DOTS_PER_INCH, layout="constrained")
        self.draw(figure)
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        return picture.getvalue()

    def write(self, folder: str | Path, made_by: Mapping[str, Any] | None = None) -> bytes:
        """Write NAME.png and NAME.json into a folder, which is made if it is not there, and return the picture.

        Args:
            made_by: what else the JSON says.

        Raises: OSError: one of them cannot be written.
        """
        folder, picture = Path(folder), self.png()
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / f"{self.name}.png", picture)
        values = self.to_dict() | ({} if made_by is None else {"made_by": dict(made_by)})
        files.write(folder / f"{self.name}.json", json.dumps(values, indent=1).encode())
        return picture


class Mean(NamedTuple):
    """A mean with the half-width of its 95 % interval, t·s/√n; None for fewer than two values."""

    value: float
    half: float | None


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of independent values and its interval."""
    n = len(values)
    if n < 2:
        return Mean(values[0], None)
    t = float(needed("scipy.stats").t.ppf(0.975, n - 1))
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n))


def largest(values: Sequence[float]) -> float:
    """Return the largest of some values; NaN if one of them is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def style(axis: Axes, title: str, x: str, y: str, legend: Any = "best") -> None:
    """Give an axis its title, its labels, a grid, and a legend at this place if its curves have names."""
    axis.set_title(title, fontsize=10)
    axis.set(xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if x == "epoch":
        axis.xaxis.set_major_locator(needed("matplotlib.ticker").MaxNLocator(integer=True))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc=legend, fontsize=8, framealpha=0.85, edgecolor="none")


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
