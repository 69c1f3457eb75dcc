"""BatchNorm, activation, convolution: the unit of pre-activation networks, as a module and as a step of blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fusedres.autograd import (
    NormActConvPlan,
    NormActConvTensors,
    count_path,
    run_norm_act_conv,
    run_sum,
    wants_gradients,
)
from fusedres.backends import backend_for
from fusedres.modules.anatomy import Gathered, Unit, anatomy_of
from fusedres.modules.calls import holds_inference_tensors, keep_reason, unusual_input
from fusedres.modules.choice import not_measured
from fusedres.modules.gathering import gather_unit
from fusedres.modules.genuine import replaced_in_tails, replaced_in_units, touched
from fusedres.modules.reading import read_input, read_norm_act_conv
from fusedres.modules.tail_running import kind_of, reason_of_activation, slope_of
from fusedres.values import arithmetic_dtype


class NormActConv(nn.Module):
    """y = conv(act(norm(x))): the unit of pre-activation networks and of DenseNet, in two passes and the convolution.

    Saved for backward is x alone: the values of norm and activation are computed again. torch saves x and the
    activation's result, and with other activations than ReLU the norm's result too. The numbers are those of torch's
    own operators, which run instead where something is unusual: hooks, another norm or activation, torch.compile.

    Shapes: x (N, C, H, W) to (N, K, P, Q), channels_last without copies. Dtypes: float32, float64, bfloat16, float16.

    Args:
        norm: nn.BatchNorm2d or nn.SyncBatchNorm of C channels.
        activation: nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Hardswish or nn.GELU; with SyncBatchNorm nn.ReLU.
        conv: nn.Conv2d from C channels, without bias.

    Raises:
        ValueError, TypeError, RuntimeError: wrong channels, shape, dtype or device of x; nothing is updated then.

    Source: He et al. 2016, Identity Mappings in Deep Residual Networks, https://arxiv.org/abs/1603.05027.
    """

    def __init__(self, norm: nn.Module, activation: nn.Module, conv: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation, self.conv = norm, activation, conv

    def forward(self, x: Tensor) -> Tensor:
        """Return conv(act(norm(x))); see the class."""
        (y,), reason = run_unit(type(self).__name__, x, ("norm", self.norm), self.activation, {"conv": self.conv})
        keep_reason(self, reason or "")
        return y

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        return standing_reason(("norm", self.norm), self.activation, {"conv": self.conv})


Named = tuple[str, nn.Module]
_Plan = tuple[NormActConvPlan, tuple[Unit, ...]]


class Ready(NamedTuple):
    """A step that the block before it has prepared: what it reads, its plan, and the state of its BatchNorm."""

    x: Tensor
    plan: _Plan
    state: Tensor


def run_unit(
    op: str,
    x: Tensor,
    norm: Named | None,
    activation: nn.Module | None,
    convs: Mapping[str, nn.Module],
    carries: bool = False,
    ready: Ready | None = None,
    pooled: bool = False,
) -> tuple[tuple[Tensor, ...], str | None]:
    """Return conv(act(norm(x))) of each convolution, and why torch's own operators ran, or None.

    Args:
        op: the name of the module's class, for errors.
        norm, activation: both None: conv(x).
        convs: the convolutions, by their names in the module.
        carries: return x too, as the shortcut: the sum of its two gradients costs no pass of its own then.
        ready: of this step, from add_before.
        pooled: average what the convolutions read over windows of 2x2 pixels, which is left out if torch's run.

    Raises: see NormActConv.
    """
    known = ready is not None and ready.x is x
    found = ready.plan if ready is not None and known else _read(op, x, norm, activation, convs)
    if isinstance(found, str):
        count_path("norm_act_conv_unfused")
        h = x if norm is None or activation is None else activation(norm[1](x))
        outs = tuple(conv(h) for conv in convs.values())
        return (*outs, x) if carries else outs, found
    plan, units = found
    plan = plan._replace(carries=carries, pooled=pooled)
    slope = slope_of(activation, x.shape[1], x.device, arithmetic_dtype(x.dtype))
    weights = [unit.conv_weight for unit in units]
    recorded = wants_gradients(x, (slope, units[0].weight, units[0].bias, *weights))
    state = ready.state if ready is not None and known else None
    tensors = NormActConvTensors(units[0].tensors[1:], weights, slope, state)
    return run_norm_act_conv(x, plan, tensors, recorded), None


def add_before(
    op: str, y: Tensor, shortcut: Tensor, norm: Named, activation: nn.Module, convs: Mapping[str, nn.Module]
) -> tuple[Tensor, Ready | None]:
    """Return y + shortcut, in the memory of y, and the step that reads it, if its statistics were taken with the sum.

    Args:
        y, shortcut: of one shape and dtype.
        op, norm, activation, convs: of the step, see run_unit.

    Raises: see NormActConv.
    """
    found = _read(op, y, norm, activation, convs)
    dense = all(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (y, shortcut))
    if isinstance(found, str) or not dense:
        return y.add_(shortcut), None
    plan, units = found
    if not plan.units[0].batch_statistics or plan.units[0].group is not None or shortcut.is_inference():
        return y.add_(shortcut), None
    total, state = run_sum(y, shortcut, plan, units[0].tensors[1:])
    return total, Ready(total, found, state)


def standing_reason(norm: Named | None, activation: nn.Module | None, convs: Mapping[str, nn.Module]) -> str | None:
    """Return why no input of such a unit runs fused, or None."""
    found = _parts(norm, activation, convs)
    return found if isinstance(found, str) else None


def _read(
    op: str, x: Any, norm: Named | None, activation: nn.Module | None, convs: Mapping[str, nn.Module]
) -> _Plan | str:
    """Return the plan of a call and its units, or why torch's own operators run."""
    reason = unusual_input(x)
    if reason is not None:
        return reason
    if torch.compiler.is_compiling():
        return "torch.compile fuses torch's operators itself"
    backend = backend_for(x.device)
    if backend is None:
        return not_measured(x.device)
    units = _parts(norm, activation, convs)
    if isinstance(units, str):
        return units
    given = read_input(op, x, backend, "library", None)
    reason = None if activation is None else reason_of_activation(activation, x)
    if reason is not None:
        return reason
    plan = read_norm_act_conv(given, units, None if activation is None else kind_of(activation))
    if isinstance(plan, str):
        return plan
    if x.numel() == 0:
        return "the batch was empty"
    tensors = tuple(tensor for unit in units for tensor in unit.tensors)
    if holds_inference_tensors(x, tensors, wants_gradients(x, tensors) or plan.units[0].update):
        return "a tensor was made in inference mode"
    return plan, units


def _parts(norm: Named | None, activation: nn.Module | None, convs: Mapping[str, nn.Module]) -> tuple[Unit, ...] | str:
    """Return each convolution with the norm before it, or why no input runs fused."""
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    reason = replaced_in_units() if activation is None else replaced_in_tails()
    if reason is None and activation is not None:
        reason = touched("the activation", activation) or reason_of_activation(activation, None)
    if reason is not None:
        return reason
    raw = []
    for name, conv in convs.items():
        unit = gather_unit(name, "", conv, None) if norm is None else gather_unit(name, norm[0], conv, norm[1])
        if isinstance(unit, str):
            return unit
        raw.append(unit)
    found = anatomy_of(Gathered(tuple(raw)))
    if isinstance(found, str):
        return found
    if norm is not None and found.synchronised and kind_of(activation) != "relu":
        return f"{norm[0]} is synchronised, which is fused with ReLU alone"
    return found.units
