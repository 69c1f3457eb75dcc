"""Capture steps in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(step: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """Return the replay of `step` as one CUDA graph, and the result of the captured step; each replay overwrites it.

    `step` must begin by dropping the gradients of the step before. Graphs of one `pool` share the memory of
    temporaries, so results must be read right after the replay of their own graph.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        kept = step()
    return graph.replay, kept
