"""Steps captured in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def captured(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The replay of `step` as one CUDA graph, and what the captured step returned; a replay writes it anew.

    `step` must begin by dropping the gradients of the one before.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step()
    return graph.replay, kept
