"""Reads from the forward of a block which tails it has: BatchNorm, activation and sum, in any order that a tail has.

As in tracing.py the forward runs once without a tensor. What it finds is a row of steps: calls of modules, such as
convolutions, which keep being called, and tails, each of which takes the place of up to four modules and sums:

    act(BN(y) + S)        or        act(BN(y)) + S        S: absent, any earlier value, or BatchNorm of one

A value between the parts of a tail must be read by the next part alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fusedres.modules.noting import Notes, UnfitError, Value, noting_copy
from fusedres.modules.parts import FUNCTION, Parts, Step
from fusedres.modules.tail_running import KINDS


class _Trace(Notes):
    """What one run of a block's forward has noted."""

    def __init__(self) -> None:
        super().__init__()
        self.values: list[_Value] = []
        self.identities: list[str] = []
        self.statistics: list[dict[str, Any]] = []  # the buffers of each norm; copies of a module share them

    def note_norm(self, path: str, buffers: dict[str, Any]) -> None:
        """Raise if a norm is used twice, under one name or two: its running statistics depend on the order."""
        if any(buffers is found for found in self.statistics):
            raise UnfitError(f"its forward uses {path} twice")
        self.statistics.append(buffers)

    def is_part(self, module: nn.Module) -> bool:
        return not isinstance(module, nn.Sequential) and not any(module.children())

    def call(self, path: str, cls: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], _Value):
            raise UnfitError(f"{path} gets something else than one tensor")
        x = args[0]
        if cls is nn.Identity:
            self.identities.append(path)
            return x
        kind = _kind_of(cls)
        state = object.__getattribute__(module, "__dict__")
        if kind == "norm":
            self.note_norm(path, state["_buffers"])
        in_place = bool(state.get("inplace", False))  # not noted as a condition
        fresh = kind in ("conv", "norm") or (kind == "activation" and (x.fresh or not in_place))
        return _Value(self, kind, path, (x,), fresh, in_place)


def _kind_of(cls: type[nn.Module]) -> str:
    if issubclass(cls, nn.modules.conv._ConvNd | nn.Linear):
        return "conv"
    if issubclass(cls, nn.modules.batchnorm._BatchNorm):
        return "norm"
    return "activation" if cls in KINDS or cls.__module__.endswith(("activation", "activations")) else "other"


class _Value(Value):
    """Stands for a tensor: how it was made, and what is made of it.

    Args:
        kind: input, conv, norm, activation, other (modules), or sum.
        fresh: nothing outside the block can have the same memory.
        in_place: it takes the place of its first input.
    """

    def __init__(
        self, trace: _Trace, kind: str, path: str = "", inputs: tuple[_Value, ...] = (), fresh: bool = True,
        in_place: bool = False,
    ) -> None:  # fmt: skip
        self.trace, self.kind, self.path, self.inputs, self.fresh = trace, kind, path, inputs, fresh
        self.in_place = in_place
        self.users: list[_Value] = []
        self.index, self.overwritten = len(trace.values), False
        for value in inputs:
            if value.overwritten:
                raise UnfitError("its forward uses a tensor that it has overwritten")
            value.users.append(self)
        if in_place:
            inputs[0].overwritten = True
        trace.values.append(self)

    def _relu(self, in_place: bool) -> _Value:
        if not self.fresh:
            raise UnfitError("its forward calls relu on a tensor that others may see")
        return _Value(self.trace, "activation", FUNCTION, (self,), True, in_place)

    def relu(self) -> _Value:
        """Stand for Tensor.relu."""
        return self._relu(False)

    def relu_(self) -> _Value:
        """Stand for Tensor.relu_."""
        return self._relu(True)

    def __add__(self, other: Any) -> _Value:
        if type(other) is not _Value:
            raise UnfitError("its forward adds something else than two tensors")
        return _Value(self.trace, "sum", "", (self, other))

    add = __add__

    def __iadd__(self, other: Any) -> _Value:
        if not self.fresh:
            raise UnfitError("its forward adds in place to a tensor that others may see")
        found = self + other
        self.overwritten = found.in_place = True
        return found

    add_ = __iadd__

    def only_user(self) -> _Value | None:
        """Return what is made of this value, if that is one thing."""
        return self.users[0] if len(self.users) == 1 else None

    def is_activated_norm(self) -> bool:
        """Whether this is the activation of a norm that nothing else reads."""
        return self.kind == "activation" and self.inputs[0].kind == "norm" and len(self.inputs[0].users) == 1


# --- from values to steps


class _Tail(NamedTuple):
    """The values that a tail makes, the last of them its result; all but norm are optional."""

    norm: _Value
    activation: _Value | None
    before_add: bool
    total: _Value | None
    shortcut_norm: _Value | None

    @property
    def members(self) -> list[_Value]:
        """All of its values."""
        return [v for v in (self.norm, self.activation, self.total, self.shortcut_norm) if v is not None]

    @property
    def end(self) -> _Value:
        """Its result."""
        return max(self.members, key=lambda value: value.index)


def _tail_of(norm: _Value) -> _Tail:
    """Return the longest tail that begins with a norm."""
    activation: _Value | None = None
    end, user = norm, norm.only_user()
    if user is not None and user.kind == "activation":
        activation, end = user, user
        user = end.only_user()
    before = activation is not None
    if user is None or user.kind != "sum":
        return _Tail(norm, activation, before, None, None)
    other = user.inputs[0] if user.inputs[1] is end else user.inputs[1]
    alone = other.only_user() is user
    if not before and alone and other.is_activated_norm():
        return _Tail(norm, None, False, None, None)  # the sum belongs to the other's tail, with the activation
    shortcut_norm = other if alone and other.kind == "norm" else None
    after = user.only_user()
    if not before and after is not None and after.kind == "activation":
        activation = after
    return _Tail(norm, activation, before, user, shortcut_norm)


def _tails_of(trace: _Trace) -> dict[int, _Tail]:
    """Return the tails by the index of their result; the last norm of a sum takes the sum."""
    found: dict[int, _Tail] = {}
    taken: set[int] = set()
    for norm in reversed(trace.values):
        if norm.kind != "norm" or norm.index in taken:
            continue
        tail = _tail_of(norm)
        if tail.total is not None and tail.total.index in taken:
            activation = tail.activation if tail.before_add else None
            tail = _Tail(norm, activation, tail.before_add, None, None)
        taken |= {value.index for value in tail.members}
        found[tail.end.index] = tail
    return found


def _steps_of(trace: _Trace, out: _Value) -> tuple[Step, ...]:
    """Return the steps of the forward that has computed out; raise UnfitError if it has no tail."""
    for value in trace.values:
        if value.overwritten and len(value.users) > 1:
            raise UnfitError("its forward uses a tensor that it has overwritten")
        if not value.users and value is not out:
            raise UnfitError("its forward computes something that is not in its result")
    tails = _tails_of(trace)
    if not tails:
        raise UnfitError("its forward has no BatchNorm")
    inside = {value.index for tail in tails.values() for value in tail.members}
    numbers = {0: 0}
    steps: list[Step] = []
    for value in trace.values[1:]:
        if value.index not in inside or value.index in tails:
            steps.append(_step_of(value, tails.get(value.index), numbers))
            numbers[value.index] = len(steps)
    last = {number: index for index, step in enumerate(steps) for number in (step.x, step.shortcut)}
    return tuple(
        step._replace(last=tuple(number for number, end in last.items() if end == index and number is not None))
        for index, step in enumerate(steps)
    )


def _step_of(value: _Value, tail: _Tail | None, numbers: dict[int, int]) -> Step:
    x = numbers.get(value.inputs[0].index, 0)
    if tail is None and value.kind == "sum":
        return Step(x, shortcut=numbers[value.inputs[1].index], into=0 if value.in_place else None)
    if tail is None:
        return Step(x, activation=FUNCTION) if value.path == FUNCTION else Step(x, call=value.path)
    activation, total = tail.activation, tail.total
    shortcut = into = None
    if total is not None:
        term = tail.activation if tail.before_add else tail.norm
        first = total.inputs[0] is term
        shortcut = total.inputs[1 if first else 0]
        into = None if not total.in_place else 0 if first else 1
    if tail.shortcut_norm is not None:
        shortcut = tail.shortcut_norm.inputs[0]
    return Step(
        numbers[tail.norm.inputs[0].index],
        norm=tail.norm.path,
        activation=None if activation is None else activation.path,
        before_add=tail.before_add,
        shortcut=None if shortcut is None else numbers[shortcut.index],
        shortcut_norm=None if tail.shortcut_norm is None else tail.shortcut_norm.path,
        into=into,
    )


def tails_of(block: nn.Module, forward: Callable[..., Any]) -> Parts | str:
    """Return the steps of a block whose class has this forward, or why it has no tail that can be fused."""
    trace = _Trace()
    try:
        out = forward(noting_copy(block, trace), _Value(trace, "input", fresh=False))
        if not isinstance(out, _Value):
            raise UnfitError(f"its forward returns a {type(out).__name__}")
        steps, conditions = _steps_of(trace, out), trace.conditions()
    except UnfitError as error:
        return str(error)
    except Exception as error:  # a forward may raise anything when it gets no tensor
        return f"its forward cannot be read: {type(error).__name__}: {error}"
    identities = tuple(dict.fromkeys(trace.identities))
    containers = tuple(trace.containers)
    parts = Parts((), identities=identities, containers=containers, conditions=conditions, forward=forward, steps=steps)
    return parts.named()
