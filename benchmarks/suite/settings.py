"""The settings of a step, and its cases."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from common import harness

from suite.ceilings import CEILINGS, measure_ceilings, rate_of
from suite.journal import Journal
from suite.precision import Precision

DIED = "the process died of it"


@dataclass
class Settings:
    """What a step needs to know: device, folders, time limit."""

    step: str
    out: Path
    device: torch.device
    tiny: bool
    until: float  # time.time() at which the step is ended
    after: Path | None = None  # the folder of an earlier call; its rows are read
    pack: Path | None = None  # the folder that gpu_pack.py built
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        self.journal = Journal(self.out, self.step)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The usual dtype: float32 on a CPU, as Triton's interpreter computes bfloat16 wrongly."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def patience(self) -> float:
        """Seconds after which a case counts as hung; more without a pack, as the case then compiles kernels."""
        return 20 if self.pack else 180

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return self.until - time.time()

    @cached_property
    def where(self) -> dict[str, Any]:
        """Device, driver, versions, commit, date."""
        return harness.machine(self.device)

    @cached_property
    def ceilings(self) -> dict[str, Any]:
        """copy_bytes_per_s, matmul_flops_per_s and the rate of each precision: of the step facts, else measured now."""
        for folder in filter(None, (self.out, self.after)):
            for row in Journal(folder, "facts").rows():
                if row.get("case") == "ceilings" and row.get("device") == self.where["device"]:
                    return {name: row[name] for name in (*CEILINGS, "matmul_by_precision")}
        return measure_ceilings(self.device, self.tiny)

    def ceilings_of(self, precision: Precision) -> dict[str, float]:
        """Return copy_bytes_per_s, and matmul_flops_per_s for products in this precision."""
        rates = self.ceilings["matmul_by_precision"]
        if precision.name not in rates:  # a CPU's, in another one than float32
            rates[precision.name] = rate_of(self.device, precision, self.tiny)
        return {name: self.ceilings[name] for name in CEILINGS} | {"matmul_flops_per_s": rates[precision.name]}

    def row(self, case: str, **fields: Any) -> None:
        """Append a row that is no timing."""
        self.journal.append(case=case, **self.where, **fields)


@dataclass
class Case:
    """A part of a step: `run` writes its rows; after `limit` seconds it counts as hung."""

    name: str
    run: Callable[[], None]
    limit: float = 60


def floor_seconds(ceilings: dict[str, float], moved: float, flops: float) -> float:
    """Return the least time that both ceilings allow."""
    return max(moved / ceilings["copy_bytes_per_s"], flops / ceilings["matmul_flops_per_s"])


def first_lines(text: str, count: int = 6, width: int = 300) -> str:
    """Return the first lines that are not empty."""
    return "\n".join([line[:width] for line in text.strip().splitlines() if line.strip()][:count])
