"""Stochastic depth: which samples' branches survive, and a fused block whose branch some of them drop."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from fusedres.autograd import count_path
from fusedres.modules.calls import keep_reason
from fusedres.modules.filters import filtered
from fusedres.modules.gathering import hidden
from fusedres.modules.genuine import replaced_forward, touched
from fusedres.modules.parts import Parts, at, changed
from fusedres.modules.steps import Projection, Steps, projection_of


class StochasticRate(NamedTuple):
    """How a block drops its branch in training."""

    rate: float
    mode: str  # "row": each sample by itself; "batch": the whole batch


def check_rate(op: str, rate: float, mode: str, name: str = "rate") -> None:
    """Raise where a rate or a mode of stochastic depth is none."""
    if not 0 <= rate < 1:
        raise ValueError(f"{op}: {name} must be at least 0 and less than 1, got {rate!r}")
    if mode not in ("row", "batch"):
        raise ValueError(f'{op}: mode must be "row" or "batch", got {mode!r}')


def draw_survivors(x: Tensor, rate: float, mode: str) -> Tensor | None:
    """Return b / (1 − rate) for each sample (N, 1), or for the batch (); None: the batch is dropped."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if mode == "row":
        return torch.empty((x.shape[0], 1), device=x.device, dtype=dtype).bernoulli_(1 - rate).div_(1 - rate)
    if torch.rand((), device="cpu").item() < rate:  # on the CPU: a GPU need not be waited for
        return None
    return torch.full((), 1 / (1 - rate), device=x.device, dtype=dtype)


def run_dropping(cls: Any, block: nn.Module, x: Any, parts: Parts, how: StochasticRate) -> Tensor:
    """Run a block of the fused class cls in training with stochastic depth.

    A dropped batch costs the shortcut alone; its BatchNorms do not see it. A block that is not as it was read, or an x
    that is no tensor, runs the stock forward, which drops nothing: report() says why.
    """
    reason = _changed(block, cls, parts)
    if reason is None and not (isinstance(x, fx.Proxy) or (isinstance(x, Tensor) and x.dim())):
        reason = f"the input was a {type(x).__name__} without a batch"
    if reason is not None:
        count_path("unfused")
        keep_reason(block, reason)
        result: Tensor = cls._stock.forward(block, x)
        return result
    steps = _steps_of(block, parts)
    survivors = draw_survivors(x, how.rate, how.mode)
    found, reason = (
        steps.without_branch(cls.__name__, x) if survivors is None else steps.run(cls.__name__, x, survivors)
    )
    keep_reason(block, reason or "")
    return found


def refuse_dropping(parts: Parts) -> str | None:
    """Return why a block cannot drop its branch, or None."""
    return "it has filters in its branch" if parts.filtered else None


def _changed(block: nn.Module, cls: Any, parts: Parts) -> str | None:
    """Return why the steps of a block may compute something else than its forward, or None.

    Hooks on children and other children are none of the reasons, as steps call what they cannot fuse; but which of the
    activations of a block of another class stands where is not known.
    """
    reason = replaced_forward(cls) or hidden(block, cls, parts.names) or changed(block, cls, parts)
    if reason is not None or parts.forward is None:
        return reason
    for path in parts.relus:
        module = at(block, path)
        if type(module) is not nn.ReLU:
            return f"{path} is a {type(module).__name__}, not a ReLU"
        reason = touched(path, module)
        if reason is not None:
            return reason
    return None


def _steps_of(block: nn.Module, parts: Parts) -> Steps:
    """Return the parts of a block as steps."""
    activation = at(block, parts.relus[-1]) if parts.relus else nn.ReLU()
    convs = [(unit.conv, at(block, unit.conv)) for unit in parts.units]
    norms = [(unit.norm, at(block, unit.norm)) for unit in parts.units]
    shortcut: Any = None
    if parts.downsample is not None:
        module = at(block, parts.downsample)
        shortcut = projection_of(module) or module
    elif parts.projection is not None:
        conv, norm, filters = parts.projection
        before = [at(block, path) for path in filters]
        shortcut = Projection(before, (conv, at(block, conv)), (norm, at(block, norm)))
    elif parts.zero_pad is not None:
        shortcut = at(block, parts.zero_pad)
    if parts.projection is None and parts.shortcut_filters:
        shortcut = partial(filtered, [at(block, path) for path in parts.shortcut_filters])
    return Steps(convs, norms, activation, shortcut)
