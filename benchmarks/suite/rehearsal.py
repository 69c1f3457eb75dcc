"""Rehearse a call without a GPU: print its schedule; with a pack, make every launch on a stubbed driver."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common.harness import print_table

from suite.launches import ARCH, of_step
from suite.pack import misfit
from suite.pack_rehearsal import launch_pack
from suite.schedule import CALLS, INSTALL
from suite.settings import Settings

HEADER = ["step", "first case", "from s", "by s", "cases", "launches", "in the pack", "compiled"]


def rehearse(call: str, pack: Path | None) -> int:
    """Print one line per step; return 1 if the pack lacks a kernel."""
    reason = misfit(pack, ARCH) if pack else None
    if reason:
        raise SystemExit(f"--pack: {reason}")
    lines, missing, begins = [], 0, float(INSTALL)
    with TemporaryDirectory() as folder:
        for step in CALLS[call]:
            settings = Settings(step.name, Path(folder), torch.device("cuda"), False, time.time(), None, pack)
            cases = step.list_cases(settings)
            made = of_step(step.name) if pack else []
            counts = launch_pack(pack, made) if pack and made else Counter[str]()
            missing += counts["compiled"] + counts["launchers compiled"]
            told = [str(counts[name]) if made else "–" for name in ("launches", "packed", "compiled")]
            first = cases[0].name if cases else "what failed"
            lines.append([step.name, first, f"{begins:.0f}", f"{step.by:.0f}", str(len(cases)), *told])
            begins = begins if step.beside else step.by
    print_table(HEADER, lines)
    return int(missing > 0)
