"""The launches of the steps of gpu_suite.py on a Hopper, recorded on meta tensors; gpu_pack.py compiles them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from compiled_code.candidates import Specialised, cases, record, specialise

from fusedres.kernels.triton_core.launch import Config, Launch, Problem, choosing, problem_key
from suite import miscompiled
from suite.arithmetic import GEMMS
from suite.heaviest import Heavy, heaviest
from suite.precision import PRECISIONS

ARCH = 90


@dataclass(frozen=True)
class Made:
    """A launch, and whether its kernel waits for every wgmma."""

    launch: Launch
    waits: bool = False


def of_step(step: str, blocks: str = "all") -> list[Made]:
    """Return the launches of a step on these blocks (a name or pattern, or stem); empty if they are not known ahead."""
    if step in ("right", "train", "profile", "models"):
        return _of_blocks(blocks, (256,))
    if step in ("blocks", "dispatch"):
        return _of_blocks(blocks, (256, 64, 16))
    if step == "miscompiled":
        return _of_miscompiled(blocks)
    if step == "ops":
        return [made for heavy in heaviest() if blocks in ("all", heavy.block) for made in _of_candidates(heavy)]
    return []


def distinct(made: Iterable[Made]) -> list[tuple[Specialised, bool]]:
    """Return each distinct compilation once."""
    found: dict[object, tuple[Specialised, bool]] = {}
    for one in made:
        what = specialise(one.launch, one.launch.config, ARCH)
        found.setdefault((what.key, one.waits), (what, one.waits))
    return list(found.values())


@cache
def _of_blocks(blocks: str, batches: tuple[int, ...]) -> list[Made]:
    """Return the launches of training and inference of each way, with the default configs."""
    return [
        Made(launch)
        for batch in batches
        for run in cases(blocks, batch=batch, mixed=True).values()
        for launch in record(run)
    ]


def _of_miscompiled(blocks: str) -> list[Made]:
    pattern = miscompiled.BLOCKS if blocks == "all" else blocks
    found = []
    for run in cases(pattern, miscompiled.WAYS, mixed=True).values():
        found += [Made(launch, waits=True) for launch in record(run) if launch.name in GEMMS]
    with PRECISIONS["float32"].switched():
        for run in cases(pattern, ("fused",), dtype=torch.float32).values():
            found += [Made(launch) for launch in record(run)]
            with choosing(miscompiled.in_eight_warps):
                found += [Made(launch) for launch in record(run) if launch.name.startswith(miscompiled.OF_TAPS)]
    return found


def _of_candidates(heavy: Heavy) -> list[Made]:
    """Return all launches of the block of this problem, once for each candidate."""
    (run,) = cases(heavy.block, (heavy.way,), mixed=True).values()
    candidates: list[Config] = []

    def find(problem: Problem, offered: Sequence[Config]) -> None:
        if problem_key(problem) == heavy.problem and not candidates:
            candidates.extend(offered)

    with choosing(find):
        record(run)
    found = []
    for config in candidates:

        def force(problem: Problem, offered: Sequence[Config], config: Config = config) -> Config | None:
            return config if problem_key(problem) == heavy.problem else None

        with choosing(force):
            found += [Made(launch) for launch in record(run)]
    return found
