"""Compiles the kernels' candidates on all cores while others hold the GPU, into Triton's cache.

Blocks run on meta tensors, where a launch is only recorded; each recorded launch is compiled as Triton's JIT would for
these arguments. Nothing here touches a GPU.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import triton
from inspect_kernels import Specialised, cases, compilations, record

from suite.ops import GEMMS
from suite.pack import taken


def main(batches: tuple[int, ...], processes: int, pack: str = "", arch: int = 90) -> None:
    """Forks `processes`, each of which compiles its share, what is wanted first first; what a pack has, nobody."""
    todo = []
    for batch in batches:
        for blocks, limit in (("resnet50.*", None), ("stem", None), ("resnet18.*", 1)):
            for run in cases(blocks, batch=batch).values():
                for launch in record(run):
                    todo += compilations([launch], arch, limit if launch.name in GEMMS else 1)
    todo = list({what.key: what for what in todo}.values())
    children = []
    for index in range(processes):
        child = os.fork()
        if child == 0:
            with taken(Path(pack)) if pack else nullcontext():
                _compile(todo[index::processes])
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    print(f"warm: {len(todo)} compilations on {processes} processes")


def _compile(todo: list[Specialised]) -> None:
    for what in todo:
        try:
            triton.compile(what.source, target=what.target, options=what.options)
        except Exception as error:
            print(f"warm: {what.launch.name}: {type(error).__name__}: {error}")
