"""The problems that take most of a training step of ResNet-50, by the least time that bytes and arithmetic allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from common import blocks
from common.networks import Block, resnet_blocks
from memory_traffic.launched import train_step

from fusedres.kernels.triton_core.launch import Config, Problem, choosing, problem_key
from suite.arithmetic import flops
from suite.walk import TINY

COUNT = 12
WAYS = ("fused min", "fused")
# Bytes and operations per second of a Hopper. They are fixed, so that the problems are the same on every machine.
_COPY, _MATMUL = 3e12, 7e14


@dataclass(frozen=True)
class Heavy:
    """A problem, and a block that has it when it is fused this way."""

    problem: str
    block: str
    way: str


def heaviest(tiny: bool = False) -> list[Heavy]:
    """Return the problems at batch 256 in bfloat16, the heaviest first; tiny: two problems of a toy block."""
    model = list(TINY.values()) if tiny else list(resnet_blocks(50).values())
    chosen = {name: block for name, block in (TINY | blocks.stage_blocks()).items() if block in model}
    batch, dtype = (2, torch.float32) if tiny else (256, torch.bfloat16)
    seconds: dict[str, float] = {}
    asks: dict[str, Heavy] = {}
    for way in WAYS:
        of_way: dict[str, float] = defaultdict(float)
        for name, block in chosen.items():
            for problem, least in _problems(block, way, batch, dtype):
                of_way[problem] += model.count(block) * least
                asks.setdefault(problem, Heavy(problem, name, way))
        for problem, least in of_way.items():
            seconds[problem] = max(seconds.get(problem, 0.0), least)
    order = sorted(seconds, key=lambda problem: -seconds[problem])
    return [asks[problem] for problem in order[: 2 if tiny else COUNT]]


def _problems(block: Block, way: str, batch: int, dtype: torch.dtype) -> list[tuple[str, float]]:
    """Return each problem of a training step that has several candidates, and the least seconds of its launch."""
    asked: list[tuple[Config, Problem]] = []  # the config that was returned, and the problem

    def give(problem: Problem, candidates: Sequence[Config]) -> Config | None:
        if len(candidates) < 2:
            return None
        asked.append((replace(candidates[0]), problem))
        return asked[-1][0]

    with choosing(give):
        steps = train_step(block, way, batch, dtype)
    problems = {id(config): problem_key(problem) for config, problem in asked}
    return [
        (problems[id(launch.config)], max(launch.bytes() / _COPY, flops([launch]) / _MATMUL))
        for count in steps.values()
        for launch in count.kernels
        if id(launch.config) in problems
    ]
