"""Steps captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(step: Callable[[], Any], pool: Any = None) -> tuple[Callable[[], None], Any]:
    """The replay of `step` as one CUDA graph, and what the captured step returned; a replay writes it anew.

    `step` must begin by dropping the gradients of the one before. Graphs of one `pool` use the same memory for what
    dies within a step, so only what is read right behind a graph's own replay is its own.
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
