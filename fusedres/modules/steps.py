"""Runs a residual block with the activation after the add as steps: for gates and activations that ResNet's has not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from fusedres.errors import ShapeError
from fusedres.modules.genuine import is_transparent
from fusedres.modules.norm_act_conv import Named, run_unit, standing_reason
from fusedres.modules.shortcut import AvgPoolShortcut
from fusedres.modules.tail_running import TailModules, reason_of_modules, run


class Projection(NamedTuple):
    """A shortcut that ends with a convolution and its BatchNorm; filters: the modules before them."""

    filters: Sequence[nn.Module]
    conv: Named
    norm: Named


def projection_of(downsample: nn.Module | None) -> Projection | None:
    """Return the parts of a shortcut that ends with a convolution and its BatchNorm; None if it is another module."""
    kinds = (nn.Sequential, AvgPoolShortcut)
    if downsample is None or not any(is_transparent("downsample", downsample, kind) for kind in kinds):
        return None
    children = [(f"downsample.{name}", module) for name, module in downsample._modules.items() if module is not None]
    if len(children) < 2 or not isinstance(children[-1][1], nn.BatchNorm2d):
        return None
    return Projection([module for _, module in children[:-2]], children[-2], children[-1])


class Steps(NamedTuple):
    """The parts of out = act(s⊙BN_n(conv_n(… act(BN_1(conv_1(x))))) + S(x))."""

    convs: Sequence[Named]
    norms: Sequence[Named]
    activation: Any  # nn.Module
    shortcut: Any = None  # a Projection, or what is called; None: the identity
    has_shortcut: bool = True
    excitation: Any = None  # makes s of the normalised branch

    def run(self, op: str, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, str | None]:
        """Return the result, and why some of torch's own operators ran, or None; op: the block's class, for errors."""
        (h,), reason = run_unit(op, x, None, None, dict(self.convs[:1]))
        reasons = [reason]
        for norm, conv in zip(self.norms, self.convs[1:], strict=False):
            (h,), reason = run_unit(op, h, norm, self.activation, dict([conv]))
            reasons.append(reason)
        owned = reason is None  # by nobody else: no hook of a convolution has seen it
        added, reason = self._added(op, x)
        reasons.append(reason)
        traced = isinstance(h, fx.Proxy)
        if added is not None and not traced and added.shape != h.shape:
            raise ShapeError(
                f"{op}: the shortcut must have shape {tuple(h.shape)} like the residual branch, got "
                f"{tuple(added.shape)}; give the block a downsample that reaches it"
            )
        found, reason = run(self._tail(), h, added, scale, owned)
        reasons.append(reason)
        return found, next(filter(None, reasons), None)

    def without_branch(self, op: str, x: Tensor) -> tuple[Tensor, str | None]:
        """Return act(S(x)), and why some of torch's own operators ran, or None."""
        added, reason = self._added(op, x)
        assert added is not None
        tail = self._tail()
        alone = tail._replace(
            norm=tail.shortcut_norm, shortcut_norm=None, excitation=None, names=(tail.names[1], "", tail.names[2])
        )
        found, other = run(alone, added)
        return found, reason or other

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        found = [standing_reason(None, None, dict(self.convs[:1]))]
        for norm, conv in zip(self.norms, self.convs[1:], strict=False):
            found.append(standing_reason(norm, self.activation, dict([conv])))
        if isinstance(self.shortcut, Projection):
            found.append(standing_reason(None, None, dict([self.shortcut.conv])))
        found.append(reason_of_modules(self._tail(), None, None))
        return next(filter(None, found), None)

    def _added(self, op: str, x: Tensor) -> tuple[Tensor | None, str | None]:
        """Return what is added to the branch, before its BatchNorm, and why torch's own operators made it."""
        if not self.has_shortcut:
            return None, None
        if isinstance(self.shortcut, Projection):
            for module in self.shortcut.filters:
                x = module(x)
            (x,), reason = run_unit(op, x, None, None, dict([self.shortcut.conv]))
            return x, reason
        return (x if self.shortcut is None else self.shortcut(x)), None

    def _tail(self) -> TailModules:
        (name, norm), of_shortcut = self.norms[-1], ("", None)
        if isinstance(self.shortcut, Projection):
            of_shortcut = self.shortcut.norm  # type: ignore[assignment]
        names = (name, of_shortcut[0], "activation")
        return TailModules(norm, of_shortcut[1], self.activation, False, "scale", names, self.excitation)
