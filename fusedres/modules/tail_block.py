"""Fused blocks whose forward is convolutions and tails, such as YOLO's convolution and bottleneck, iresnet's block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.autograd import count_path
from fusedres.modules.calls import keep_reason, unusual_input
from fusedres.modules.families import read_tails
from fusedres.modules.foreign import Foreign
from fusedres.modules.gathering import reason_of_code
from fusedres.modules.parts import FUNCTION, Parts, Step, at
from fusedres.modules.tail_running import TailModules, reason_of_call, reason_of_modules, run_fused, run_unfused
from fusedres.ops._sizes import FLOATING

_RELU = nn.ReLU()


class FusedTailBlock(Foreign):
    """Mixin of a block whose forward tail_reading.py has read: each tail runs in one pass, other modules are called.

    Convolutions are called as modules, so their hooks run, and they may be anything that takes a tensor. Where another
    part is unusual the stock forward runs.
    """

    fused_last_reason: str | None = None  # why the last input ran unfused; "": it ran fused
    _read = staticmethod(read_tails)

    def unfused_reason(self) -> str | None:
        """Return why the stock forward runs for every input, or None."""
        cls: Any = type(self)
        parts: Parts = self.__dict__.get("_parts", cls._parts)
        if not parts.steps:
            return "it was not read"
        return reason_of_code(self, cls, nn.Module, parts) or _reason_of_steps(self, parts.steps)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return what the stock forward returns; a call with anything but one tensor runs that."""
        cls: Any = type(self)
        if not issubclass(cls, FusedTailBlock):  # another thread called unfuse() just now
            return cls.forward(self, *inputs, **named)
        reason: str | None = "it was called with more than one input, or by name"
        if len(inputs) == 1 and not named:
            reason = unusual_input(inputs[0])
            if reason is None and torch.compiler.is_compiling():
                reason = "torch.compile fuses torch's operators itself"
            if reason is None and FusedTailBlock.unfused_reason(self) is None:
                return _run(self, self.__dict__["_parts"].steps, inputs[0])
        count_path("unfused")
        keep_reason(self, reason)
        return cls._stock.forward(self, *inputs, **named)


def _modules_of(block: nn.Module, step: Step) -> TailModules:
    norm, shortcut_norm, activation = step.norm, step.shortcut_norm, step.activation
    return TailModules(
        None if norm is None else at(block, norm),
        None if shortcut_norm is None else at(block, shortcut_norm),
        _RELU if activation == FUNCTION else None if activation is None else at(block, activation),
        step.before_add,
        names=(norm or "", shortcut_norm or "", activation or ""),
    )


def _reason_of_steps(block: nn.Module, steps: tuple[Step, ...]) -> str | None:
    """Return which module is missing, or why a tail runs unfused for every input, or None."""
    for step in steps:
        for path in step.paths:
            if at(block, path) is None:
                return f"{path} is missing"
        reason = None if step.norm is None else reason_of_modules(_modules_of(block, step), None, None)
        if reason is not None:
            return reason
    return None


def _run(block: nn.Module, steps: tuple[Step, ...], x: Tensor) -> Any:
    """Run the steps; a tail that this input cannot run fused calls its modules."""
    values: list[Any] = [x]
    why = ""
    for step in steps:
        branch = values[step.x]
        shortcut = None if step.shortcut is None else values[step.shortcut]
        if step.call is not None:
            out = at(block, step.call)(branch)
        else:
            tail = _modules_of(block, step)
            reason = None if step.norm is None else _reason_of_tensors(tail, branch, shortcut)
            if step.norm is not None and reason is None:
                out = run_fused(tail, branch, shortcut)
            else:
                why = why or reason or ""
                out = run_unfused(tail, branch, shortcut)
        values.append(out)
        for number in step.last:
            values[number] = None
    keep_reason(block, why)
    return values[-1]


def _reason_of_tensors(tail: TailModules, branch: Any, shortcut: Any) -> str | None:
    """Return why a tail runs unfused for these values, or None."""
    for value in (branch,) if shortcut is None else (branch, shortcut):
        if not isinstance(value, Tensor) or value.dtype not in FLOATING or value.dim() not in (2, 4):
            return f"{tail.names[0]} was given no float tensor of shape (N, C, H, W) or (N, C)"
    if shortcut is not None and shortcut.shape != branch.shape:
        return f"the shortcut had shape {tuple(shortcut.shape)}, the branch {tuple(branch.shape)}"
    reason = reason_of_call(tail, branch, shortcut)
    if reason is not None:
        count_path("tail_unfused")
    return reason
