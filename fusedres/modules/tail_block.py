"""Fused blocks whose forward is convolutions and tails, such as YOLO's convolution and bottleneck, iresnet's block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusedres.autograd import count_path
from fusedres.backends import automatic
from fusedres.modules.calls import keep_reason, options_of, unusual_input
from fusedres.modules.families import read_tails
from fusedres.modules.foreign import Foreign
from fusedres.modules.gathering import reason_of_code
from fusedres.modules.parts import FUNCTION, Parts, Step, at
from fusedres.modules.tail_running import TailModules, reason_of_call, reason_of_modules, run_fused, run_unfused
from fusedres.ops._sizes import FLOATING

_RELU = nn.ReLU()

# Each pass would copy to channels_last and back: a training step of YOLO11n took 1.2 of eager's time.
SLOWER = 'tails of tensors that are not channels_last are slower fused; fuse(model, memory="min") saves their memory'


class FusedTailBlock(Foreign):
    """Mixin of a block whose forward tail_reading.py has read: each tail runs in one pass, other modules are called.

    Convolutions are called as modules, so their hooks run, and they may be anything that takes a tensor. A tail that is
    unusual calls its modules; where anything else is unusual the stock forward runs.
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
            parts = self.__dict__.get("_parts", cls._parts)
            if reason is None and parts.steps and reason_of_code(self, cls, nn.Module, parts) is None:
                modules = _modules_of(self, parts.steps)
                if not isinstance(modules, str):
                    return _run(self, parts.steps, modules, inputs[0])
        count_path("unfused")
        keep_reason(self, reason)
        return cls._stock.forward(self, *inputs, **named)


_Modules = list[TailModules | nn.Module]  # of each step: what is called, or the modules of its tail


def _modules_of(block: nn.Module, steps: tuple[Step, ...]) -> _Modules | str:
    """Return the modules of each step, or which of them is missing."""
    found: _Modules = []
    for step in steps:
        path: str | None
        modules: list[Any] = []
        for path in (step.call, step.norm, step.shortcut_norm, step.activation):
            module = None if path is None else _RELU if path == FUNCTION else at(block, path)
            if module is None and path is not None:
                return f"{path} is missing"
            modules.append(module)
        names = (step.norm or "", step.shortcut_norm or "", step.activation or "")
        called, norm, shortcut_norm, activation = modules
        tail = TailModules(norm, shortcut_norm, activation, step.before_add, names=names, into=step.into)
        found.append(tail if called is None else called)
    return found


def _reason_of_steps(block: nn.Module, steps: tuple[Step, ...]) -> str | None:
    """Return which module is missing, or why a tail runs unfused for every input, or None."""
    modules = _modules_of(block, steps)
    if isinstance(modules, str):
        return modules
    reasons = (
        reason_of_modules(tail, None, None)
        for step, tail in zip(steps, modules, strict=True)
        if step.norm is not None and isinstance(tail, TailModules)
    )
    return next(filter(None, reasons), None)


def _run(block: nn.Module, steps: tuple[Step, ...], modules: _Modules, x: Tensor) -> Any:
    """Run the steps; a tail that this input cannot run fused calls its modules."""
    values: list[Any] = [x]
    why = ""
    options = options_of(block)
    anyhow = options.memory != "auto" or options.conv != "auto" or not automatic()
    for step, called in zip(steps, modules, strict=True):
        branch = values[step.x]
        if not isinstance(called, TailModules):
            values.append(called(branch))
        else:
            shortcut = None if step.shortcut is None else values[step.shortcut]
            reason = None if step.norm is None else _reason_of_tensors(called, branch, shortcut, anyhow)
            fused = step.norm is not None and reason is None
            if reason is not None:
                count_path("tail_unfused")
                reason = reason if reason_of_modules(called, None, None) is None else None  # else the parts say it
            values.append((run_fused if fused else run_unfused)(called, branch, shortcut))
            why = why or reason or ""
        for number in step.last:
            values[number] = None
    keep_reason(block, why)
    return values[-1]


def _reason_of_tensors(tail: TailModules, branch: Any, shortcut: Any, anyhow: bool) -> str | None:
    """Return why a tail runs unfused for these values, or None; anyhow: also where it is slower."""
    for value in (branch,) if shortcut is None else (branch, shortcut):
        if not isinstance(value, Tensor) or value.dtype not in FLOATING or value.dim() not in (2, 4):
            return f"{tail.names[0]} was given no float tensor of shape (N, C, H, W) or (N, C)"
    if shortcut is not None and shortcut.shape != branch.shape:
        return f"the shortcut had shape {tuple(shortcut.shape)}, the branch {tuple(branch.shape)}"
    if shortcut is not None and shortcut.dtype != branch.dtype and tail.into is not None:
        return f"a sum in place had terms of {branch.dtype} and {shortcut.dtype}"
    fitting = branch.dim() != 4 or branch.is_contiguous(memory_format=torch.channels_last)
    if branch.is_cpu and not fitting and not anyhow:
        return SLOWER
    return reason_of_call(tail, branch, shortcut)
