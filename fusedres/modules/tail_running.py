"""One call of a residual tail with its modules: why it runs unfused, the fused run, and the same by torch's operators.

ResidualTail (tail.py) and the blocks whose forward has tails (tail_block.py) share it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fusedres.autograd import TailPlan, TermNorm, TermTensors, are_plain, run_tail, wants_gradients
from fusedres.backends import backend_for
from fusedres.errors import ShapeError
from fusedres.modules.calls import holds_inference_tensors, unusual_input
from fusedres.modules.genuine import replaced_in_tails, touched
from fusedres.modules.squeeze_excitation import reason_of_excitation
from fusedres.ops._sizes import FLOATING
from fusedres.values import arithmetic_dtype

NormTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_ABSENT: NormTensors = (None, None, None, None, None)
KINDS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}


class TailModules(NamedTuple):
    """The modules and settings of a tail; see ResidualTail.

    names: of the three modules, for reasons. into: which term the sum takes the place of, and has the dtype of: 0 for
    the branch, 1 for the shortcut; None: neither.
    """

    norm: Any  # nn.Module | None; mypy would not find their settings
    shortcut_norm: Any
    activation: Any
    before_add: bool
    gate: str = "scale"
    names: tuple[str, str, str] = ("norm", "shortcut_norm", "activation")
    excitation: Any = None  # an Excitation, which makes the branch's factor of the normalised branch
    into: int | None = None


def reason_of_call(tail: TailModules, *tensors: Tensor | None) -> str | None:
    """Return why torch's own operators run for these tensors, or None if the tail is fused.

    tensors: branch, shortcut, scale and carry, of shapes that fit each other.
    """
    branch, shortcut = tensors[:2]
    assert branch is not None
    for tensor in tensors:
        reason = None if tensor is None else unusual_input(tensor)
        if reason is not None:
            return reason
    if torch.compiler.is_compiling():
        return "torch.compile fuses torch's operators itself"
    if any(tensor is not None and tensor.device != branch.device for tensor in tensors):
        return "the tensors are on several devices"
    if branch.numel() == 0:
        return "the batch was empty"
    if backend_for(branch.device) is None:
        return f"nothing was measured on {branch.device.type}"
    return reason_of_modules(tail, branch, shortcut) or _reason_of_inference(tail, branch, *tensors[1:])


def reason_of_modules(tail: TailModules, branch: Tensor | None, shortcut: Tensor | None) -> str | None:
    """Return why a norm or the activation runs unfused, for these inputs or, without a branch, for any, or None."""
    if nn_module._has_any_global_hook():
        return "a global module hook is registered"
    replaced = replaced_in_tails()
    if replaced is not None:
        return replaced
    for name, norm, x in zip(tail.names, (tail.norm, tail.shortcut_norm), (branch, shortcut), strict=False):
        if norm is None or (x is None and branch is not None):
            continue
        reason = touched(name, norm) or reason_of_norm(norm, x)
        if reason is not None:
            return reason
    reason = None if tail.excitation is None else reason_of_excitation(tail.excitation, branch)
    if reason is not None or tail.activation is None:
        return reason
    return touched(tail.names[2], tail.activation) or reason_of_activation(tail.activation, branch)


def _reason_of_inference(tail: TailModules, branch: Tensor, *others: Tensor | None) -> str | None:
    """Return that torch refuses to save or to write tensors that were made in inference mode, if it does."""
    held = [branch, *others]
    for module in (tail.norm, tail.shortcut_norm, tail.activation, tail.excitation):
        if module is not None:
            held += [*module.parameters(), *module.buffers()]
    if not any(tensor is not None and tensor.is_inference() for tensor in held):
        return None
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in held)
    written = any(norm is not None and norm.training for norm in (tail.norm, tail.shortcut_norm))
    if holds_inference_tensors(branch, tuple(held), recorded or written):
        return "a tensor was made in inference mode"
    return None


def run(
    tail: TailModules, branch: Tensor, shortcut: Tensor | None = None, scale: Tensor | None = None, owned: bool = False
) -> tuple[Tensor, str | None]:
    """Return the tail of tensors that fit each other, and why torch's own operators ran, or None.

    owned: nobody else has the branch, it may be written over.
    """
    reason = reason_of_call(tail, branch, shortcut, scale, None)
    if reason is not None:
        return run_unfused(tail, branch, shortcut, scale), reason
    return run_fused(tail, branch, shortcut, scale, owned=owned), None


def run_unfused(
    tail: TailModules,
    branch: Tensor,
    shortcut: Tensor | None = None,
    scale: Tensor | None = None,
    carry: Tensor | None = None,
) -> Tensor:
    """Run a tail by calling its modules."""
    value = branch if tail.norm is None else tail.norm(branch)
    if tail.excitation is not None:
        value = value * tail.excitation(value)
    if tail.before_add:
        value = _activated(tail.activation, value, branch)
    value = _gated(tail.gate, value, scale, branch)
    if shortcut is not None:
        added = shortcut if tail.shortcut_norm is None else tail.shortcut_norm(shortcut)
        if tail.gate == "coupled":
            assert scale is not None
            value = value + added * (1 - scale.sigmoid())
        else:
            terms = (value, _gated(tail.gate, added, carry, branch))
            total = terms[0] + terms[1]
            value = total if tail.into is None else total.to(terms[tail.into].dtype)
    return value if tail.before_add else _activated(tail.activation, value, branch)


def _activated(activation: Any, value: Tensor, branch: Tensor) -> Tensor:
    """Call an activation; one that works in place does not change the branch itself, as in a fused tail."""
    if activation is None:
        return value
    if value is branch and getattr(activation, "inplace", False):
        value = value.clone()
    result: Tensor = activation(value)
    return result


def _gated(kind: str, value: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
    if gate is None:
        return value
    if kind != "scale":
        return value * gate.sigmoid()
    rows, columns = rows_of("scale", gate, x)
    return value * gate.to(value.dtype).reshape(rows, columns, *(1,) * (x.dim() - 2))


def run_fused(
    tail: TailModules,
    branch: Tensor,
    shortcut: Tensor | None = None,
    scale: Tensor | None = None,
    carry: Tensor | None = None,
    owned: bool = False,
) -> Tensor:
    """Run a tail for which reason_of_call has no reason; owned: see run."""
    whole = [branch, shortcut, *((scale, carry) if tail.gate != "scale" else ())]
    dtype = branch.dtype
    for tensor in whole:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    terms, norms = [], []
    for x, norm, gate in ((branch, tail.norm, scale), (shortcut, tail.shortcut_norm, carry)):
        settings, vectors = (None, _ABSENT) if norm is None or x is None else norm_of(norm)
        factor = logits = None
        if gate is not None and tail.gate == "scale":
            factor = _factor(gate, branch, dtype)
        else:
            logits = None if gate is None else gate.to(dtype)
        terms.append(TermTensors(None if x is None else x.to(dtype), *vectors, factor, logits))
        norms.append(settings)
    slope = slope_of(tail.activation, branch.shape[1], branch.device, arithmetic_dtype(dtype))
    backend = backend_for(branch.device)
    assert backend is not None
    kind, coupled = kind_of(tail.activation), tail.gate == "coupled"
    plan = TailPlan((norms[0], norms[1]), shortcut is not None, kind, tail.before_add, coupled, backend)
    tensors: tuple[Tensor | None, ...] = (*terms[0], *terms[1], slope)
    if tail.excitation is not None:
        autocast = torch.is_autocast_enabled(branch.device.type) and dtype is not torch.float64
        plan = plan._replace(excitation=torch.get_autocast_dtype(branch.device.type) if autocast else dtype)
        tensors += tail.excitation.tensors()
    return run_tail(plan, tensors, wants_gradients(branch, tensors), owned)


def reason_of_norm(norm: Any, x: Tensor | None) -> str | None:
    """Return why a norm of x, or of any x for None, runs unfused, or None."""
    name = type(norm).__name__
    if type(norm) not in (nn.BatchNorm2d, nn.BatchNorm1d):
        return f"there is no kernel for {name}"
    if x is None:
        return None
    if (type(norm) is nn.BatchNorm1d) != (x.dim() == 2):
        return f"{name} does not take {x.dim()} dimensions"
    settings, vectors = norm_of(norm)
    if settings.batch_statistics and x.numel() == x.shape[1]:
        return "a batch of one value for each channel has no variance"
    if (vectors[2] is None) != (vectors[3] is None) or not settings.eps > 0:
        return f"{name} has one running statistic of two, or an eps of 0"
    for vector in vectors[:4]:
        if vector is not None and not _is_vector(vector, x):
            return f"{name} has a tensor that is no plain vector of {x.shape[1]} numbers on {x.device}"
    batches = vectors[4]
    if batches is not None and (batches.dtype is not torch.int64 or batches.numel() != 1 or batches.device != x.device):
        return f"{name} counts its batches in {batches.dtype} on {batches.device}"
    return None


def _is_vector(vector: Tensor, x: Tensor) -> bool:
    """Return whether a tensor is a dense vector with a number for each channel of x."""
    dense = vector.shape == x.shape[1:2] and vector.is_contiguous() and are_plain(vector)
    return dense and vector.device == x.device and vector.dtype in FLOATING


def norm_of(norm: Any) -> tuple[TermNorm, NormTensors]:
    """Return the settings of a BatchNorm, and its tensors."""
    batch_statistics = norm.training or (norm.running_mean is None and norm.running_var is None)
    update = norm.training and norm.track_running_stats and norm.running_mean is not None
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return TermNorm(batch_statistics, update, norm.momentum, norm.eps), vectors


def reason_of_activation(module: Any, x: Tensor | None) -> str | None:
    """Return why an activation of x, or of any x for None, runs unfused, or None."""
    name = type(module).__name__
    if type(module) not in KINDS or (type(module) is nn.GELU and module.approximate != "none"):
        return f"there is no kernel for {module}"
    if type(module) is not nn.PReLU or x is None:
        return None
    weight = module.weight
    if not are_plain(weight) or weight.numel() not in (1, x.shape[1]) or weight.device != x.device:
        return f"{name} has no plain weight of 1 or {x.shape[1]} numbers on {x.device}"
    if torch.is_autocast_enabled(x.device.type):
        return f"autocast chooses the dtype of {name}"
    return None


def kind_of(activation: nn.Module | None) -> str:
    """Return the name that the kernels have for an activation; None: there is none."""
    return "identity" if activation is None else KINDS[type(activation)]


def slope_of(module: Any, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Return the slopes (channels,) of a leaky ReLU; other activations have none."""
    if type(module) is nn.PReLU:
        weight: Tensor = module.weight
        return weight.to(dtype).expand(channels).contiguous()
    if type(module) is nn.LeakyReLU:
        return torch.full((channels,), module.negative_slope, device=device, dtype=dtype)
    return None


def rows_of(name: str, scale: Tensor, branch: Tensor) -> tuple[int, int]:
    """Return the (rows, columns) that a factor's shape says: rows 1 or N, columns 1 or C."""
    n, c = branch.shape[:2]
    shape = tuple(scale.shape)
    if len(shape) in (3, 4) and shape[-2:] == (1, 1):
        shape = shape[:-2]
    if len(shape) < 2:
        shape = (1, *((1, *shape)[-1:]))
    if len(shape) == 2 and shape[0] in (1, n) and shape[1] in (1, c):
        return shape[0], shape[1]
    raise ShapeError(
        f"ResidualTail: {name} must be a scalar, ({c},), ({n}, 1) or ({n}, {c}), also with two more axes of length 1, "
        f"for branch {tuple(branch.shape)}, got {tuple(scale.shape)}"
    )


def _factor(scale: Tensor, branch: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor as (1 or N, C) in the arithmetic type."""
    rows, columns = rows_of("scale", scale, branch)
    return scale.reshape(rows, columns).to(arithmetic_dtype(dtype)).expand(rows, branch.shape[1]).contiguous()
