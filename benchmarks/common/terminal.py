"""Progress bars and tables, and a quiet end of scripts when their reader goes away or Ctrl-C stops them.

`begin` and `run` come from fusedres/terminal.py. It is loaded by its path, as importing the package would import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

_spec = spec_from_file_location("shared_terminal", Path(__file__).resolve().parents[2] / "fusedres" / "terminal.py")
assert _spec is not None and _spec.loader is not None
_shared = module_from_spec(_spec)
_spec.loader.exec_module(_shared)
begin, run = _shared.begin, _shared.run


class Progress:
    """A progress bar of tqdm on stderr. There is none if stderr is not a terminal or tqdm is not installed."""

    def __init__(self, total: int) -> None:
        self._bar = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(
                total=total, leave=False, file=sys.stderr, bar_format="{l_bar}{bar}| {elapsed}<{remaining}"
            )

    def step(self, text: str, amount: int = 1) -> None:
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(amount)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns as wide as their widest cell: the first two aligned left, the others aligned right."""
    widths = [max(len(r[k]) for r in [header, *rows]) for k in range(len(header))]
    for r in [header, *rows]:
        cells = (c.ljust(w) if k < 2 else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True)))
        print("  ".join(cells).rstrip())
