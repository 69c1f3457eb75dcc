"""Reads from the forward of a block which residual block it computes.

The forward runs once in plain Python, without a tensor: on a copy of the block whose modules note that they are called,
with a value that notes what is done to it. What it finds is one of

    out = relu(F(x) + S(x)),    F = conv, norm, relu, conv, norm, ...,    S = x, or conv and norm, or ZeroPadShortcut

or the first step that does not fit, in words. Every attribute of a plain value that the forward reads on the way is
kept as a condition: if it changes later, the block must be read again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from fusedres.modules.frozen_norm import is_frozen_norm
from fusedres.modules.noting import Notes, UnfitError, Value, noting_copy
from fusedres.modules.parts import Parts, UnitPaths, may_be_identity
from fusedres.modules.shortcut import ZeroPadShortcut


class _Step(NamedTuple):
    """Something that was done to a value; path: the module that did it, if one did."""

    kind: str  # conv, norm, relu, identity, zero_pad, in place (changes its input) or other
    path: str | None
    what: str  # in words


class _Trace(Notes):
    """What one run of a block's forward has noted."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0  # of parts

    def is_part(self, module: nn.Module) -> bool:
        return not isinstance(module, nn.Sequential) and (type(module) is ZeroPadShortcut or not any(module.children()))

    def call(self, path: str, cls: type[nn.Module], module: Any, args: Any, kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], _Value):
            raise UnfitError(f"{path} gets something else than one tensor")
        return args[0].then(_step_of(path, cls, module))


class _Value(Value):
    """Stands for a tensor: the steps from the block's input to it, or the two values that it is the sum of."""

    def __init__(self, trace: _Trace, steps: tuple[_Step, ...], terms: tuple[_Value, _Value] | None = None) -> None:
        self.trace, self.steps, self.terms, self.used = trace, steps, terms, False

    @property
    def is_input(self) -> bool:
        """Whether this is the block's input itself."""
        return not self.steps and self.terms is None

    def then(self, step: _Step) -> _Value:
        """Return the value after one more step."""
        self._use()
        self.trace.calls += 1
        return _Value(self.trace, (*self.steps, step), self.terms)

    def relu(self) -> _Value:
        """Stand for Tensor.relu."""
        return self.then(_Step("relu", None, "relu"))

    relu_ = relu

    def __add__(self, other: Any) -> _Value:
        if type(other) is not _Value or self.terms is not None or other.terms is not None:
            raise UnfitError("its forward adds something else than a residual branch and a shortcut")
        self._use()
        other._use()
        return _Value(self.trace, (), (self, other))

    add = __add__

    def __iadd__(self, other: Any) -> _Value:
        if self.is_input:
            raise UnfitError("its forward adds to its input in place")
        return self + other

    add_ = __iadd__

    def _use(self) -> None:
        if self.used and not self.is_input:
            raise UnfitError("its forward uses an intermediate result twice")
        self.used = True


def _step_of(path: str, cls: type[nn.Module], module: nn.Module) -> _Step:
    """Return the step of a part; its exact class is checked in each call."""
    what = f"{path} is a {cls.__name__}"
    if issubclass(cls, nn.modules.conv._ConvNd):
        return _Step("conv", path, what)
    if issubclass(cls, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm) or is_frozen_norm(cls):
        return _Step("norm", path, what)
    if issubclass(cls, nn.ReLU):
        return _Step("relu", path, what)
    if cls is ZeroPadShortcut:
        return _Step("zero_pad", path, what)
    if may_be_identity(cls):
        return _Step("identity", path, what)
    return _Step("in place" if getattr(module, "inplace", False) else "other", path, what)


# --- the grammar of a block


class _Branch(NamedTuple):
    """Units in a row, with what stands between them."""

    units: tuple[UnitPaths, ...]
    relus: tuple[str, ...]
    identities: tuple[str, ...]
    trailing: tuple[str, ...]  # filters that no convolution follows


def _paths(steps: list[_Step], kind: str) -> tuple[str, ...]:
    return tuple(step.path for step in steps if step.kind == kind and step.path is not None)


def _branch_of(steps: tuple[_Step, ...]) -> _Branch:
    """Read steps as units, with a ReLU between any two; identities may stand anywhere, filters before convolutions."""
    identities = _paths(list(steps), "identity")
    left = [step for step in steps if step.kind != "identity"]
    units: list[UnitPaths] = []
    relus: list[str] = []
    while True:
        filters: list[str] = []
        while left and left[0].kind == "other":
            path = left.pop(0).path
            assert path is not None
            filters.append(path)
        if not left or left[0].kind == "zero_pad":
            return _Branch(tuple(units), tuple(relus), identities, tuple(filters))
        conv = _expect(left, "conv", "a convolution")
        norm = _expect(left, "norm", "the BatchNorm of a convolution")
        units.append(UnitPaths(conv, norm, tuple(filters)))
        if left:
            path = _expect(left, "relu", "the ReLU between two convolutions")
            relus += [path] if path else []


def _expect(left: list[_Step], kind: str, role: str) -> str:
    """Take the first step, which must be of a kind, and return its module's path ("" for a function)."""
    if not left:
        raise UnfitError(f"its forward ends without {role}")
    step = left.pop(0)
    if step.kind != kind:
        raise UnfitError(f"{step.what}, not {role}")
    return step.path or ""


def _parts_of(out: _Value, trace: _Trace) -> Parts:
    """Return the parts of the block that a forward has computed; raise UnfitError if it is none."""
    if out.terms is None:
        raise UnfitError("its forward does not end with relu(branch + shortcut)")
    after = [step for step in out.steps if step.kind != "identity"]
    last = _expect(after, "relu", "the ReLU after the addition")
    if after:
        raise UnfitError(f"{after[0].what}, after the block's last ReLU")
    sides = [_branch_of(term.steps) for term in out.terms]
    order = (0, 1) if len(sides[0].units) >= len(sides[1].units) else (1, 0)
    branch, shortcut = sides[order[0]], sides[order[1]]
    end = out.terms[order[1]].steps
    counted = sum(len(term.steps) for term in out.terms) + len(out.steps)
    if counted != trace.calls:
        raise UnfitError("its forward computes something that is not in its result")
    if len(branch.units) not in (2, 3) or branch.trailing:
        raise UnfitError(f"its branch has {len(branch.units)} convolutions with BatchNorm, or does not end with one")
    if len(shortcut.units) > 1 or shortcut.relus or (shortcut.units and shortcut.trailing):
        raise UnfitError("its shortcut is more than one convolution with BatchNorm")
    identities = (*branch.identities, *shortcut.identities, *_paths(list(out.steps), "identity"))
    zero_pad = next(iter(_paths(list(end), "zero_pad")), None)
    if zero_pad is not None and (shortcut.trailing or len([s for s in end if s.kind != "identity"]) > 1):
        raise UnfitError(f"{zero_pad} is not the whole shortcut")
    return Parts(
        branch.units,
        tuple(dict.fromkeys((*branch.relus, *((last,) if last else ())))),
        projection=shortcut.units[0] if shortcut.units else None,
        zero_pad=zero_pad,
        shortcut_filters=shortcut.trailing,
        identities=tuple(dict.fromkeys(identities)),
        containers=tuple(trace.containers),
        conditions=trace.conditions(),
    )


def parts_of(block: nn.Module, forward: Callable[..., Any]) -> Parts | str:
    """Return the parts of a block whose class has this forward, or why no fused block computes the same."""
    trace = _Trace()
    try:
        out = forward(noting_copy(block, trace), _Value(trace, ()))
        if not isinstance(out, _Value):
            raise UnfitError(f"its forward returns a {type(out).__name__}")
        parts = _parts_of(out, trace)
    except UnfitError as error:
        return str(error)
    except Exception as error:  # a forward may raise anything when it gets no tensor
        return f"its forward cannot be read: {type(error).__name__}: {error}"
    return parts._replace(forward=forward).named()
