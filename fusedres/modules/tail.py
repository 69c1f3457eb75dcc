"""The gated residual tail as a module: what every residual block ends with, declared by its norms, gate, activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fusedres.autograd import TailPlan, TermNorm, TermTensors, count_path, run_tail, wants_gradients
from fusedres.backends import backend_for
from fusedres.errors import DtypeError, ShapeError
from fusedres.modules.calls import unusual_input
from fusedres.modules.genuine import touched
from fusedres.ops._sizes import FLOATING
from fusedres.values import arithmetic_dtype

GATES = ("scale", "logits", "coupled")

_Norm = nn.Module | None
NormTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
ABSENT: NormTensors = (None, None, None, None, None)
_PLAIN = {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.GELU: "gelu"}


class ResidualTail(nn.Module):
    """out = act(s⊙F + c⊙S), or s⊙act(F) + c⊙S, in one pass forward and two backward; see fusedres.ops.gated_tail.

    F is `branch`, or `norm(branch)`; S is `shortcut`, or `shortcut_norm(shortcut)`; without a shortcut out is s⊙act(F)
    or act(s⊙F). Every residual design is a declaration of one:

        ResNet                 ResidualTail(bn, activation=nn.ReLU())                            tail(y, x)
        Highway                ResidualTail(activation=nn.ReLU(), before_add=True, gate="coupled")   tail(y, x, t)
        squeeze-and-excitation ResidualTail(bn, activation=nn.ReLU())                            tail(y, x, sigmoid(e))
        YOLO                   ResidualTail(bn, activation=nn.SiLU(), before_add=True)           tail(y, x)
        LayerScale, ReZero     ResidualTail()                                                    tail(F, x, gamma)

    Shapes: branch, shortcut and logits (N, C, H, W), or (N, C). scale and carry: a scalar, (C,) a channel, (N, 1) a
    sample, (N, C) both, each also with two more axes of length 1. Dtypes: float32, float64, bfloat16, float16; tensors
    of different dtypes are promoted as in torch. Any memory format; channels_last needs no copy. The numbers are those
    of torch's own operators, which run instead where something is unusual: another norm or activation, hooks,
    torch.compile (which fuses them itself), an untried device.

    Args:
        norm, shortcut_norm: nn.BatchNorm2d (nn.BatchNorm1d for (N, C)) of the branch and of the shortcut.
        activation: nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.SiLU, nn.Hardswish or nn.GELU.
        before_add: the activation is in the branch, before the add; else after it.
        gate: what `scale` and `carry` of a call are. "scale": factors. "logits": s = σ(scale), c = σ(carry), of the
            branch's size. "coupled": s = σ(scale), c = 1 − σ(scale).

    Raises:
        ValueError: gate is none of these; a tensor's shape is none of these.
        TypeError: a tensor's dtype is none of these.

    Source: He et al. 2015, https://arxiv.org/abs/1512.03385, and those of fusedres.ops.gated_tail.
    """

    def __init__(
        self,
        norm: _Norm = None,
        shortcut_norm: _Norm = None,
        activation: nn.Module | None = None,
        before_add: bool = False,
        gate: str = "scale",
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise ValueError(f"ResidualTail: gate must be one of {', '.join(GATES)}, got {gate!r}")
        self.norm, self.shortcut_norm, self.activation = norm, shortcut_norm, activation
        self.before_add, self.gate = before_add, gate

    def extra_repr(self) -> str:
        """Return the settings that are no modules."""
        return f"before_add={self.before_add}, gate={self.gate!r}"

    def forward(
        self, branch: Tensor, shortcut: Tensor | None = None, scale: Tensor | None = None, carry: Tensor | None = None
    ) -> Tensor:
        """Return the tail's output; see the class."""
        self._check(branch, shortcut, scale, carry)
        reason = self.unfused_reason(branch, shortcut, scale, carry)
        if reason is not None:
            count_path("tail_unfused")
            return self._unfused(branch, shortcut, scale, carry)
        return self._fused(branch, shortcut, scale, carry)

    def unfused_reason(self, *tensors: Tensor | None) -> str | None:
        """Return why torch's own operators run for these tensors, or None if the tail is fused."""
        branch = tensors[0]
        for tensor in tensors:
            reason = None if tensor is None else unusual_input(tensor)
            if reason is not None:
                return reason
        if torch.compiler.is_compiling():
            return "torch.compile fuses torch's operators itself"
        if nn_module._has_any_global_hook():
            return "a global module hook is registered"
        for name in ("norm", "shortcut_norm", "activation"):
            module = getattr(self, name)
            reason = None if module is None else touched(name, module)
            if reason is not None:
                return reason
        assert branch is not None
        for norm, x in ((self.norm, branch), (self.shortcut_norm, tensors[1])):
            reason = None if norm is None or x is None else _reason_of_norm(norm, x)
            if reason is not None:
                return reason
        if activation_kind(self.activation) is None:
            return f"there is no kernel for {self.activation}"
        if branch.numel() == 0:
            return "the batch was empty"
        if backend_for(branch.device) is None:
            return f"nothing was measured on {branch.device.type}"
        return None

    def _check(self, branch: Tensor, shortcut: Tensor | None, scale: Tensor | None, carry: Tensor | None) -> None:
        """Raise where the tensors do not fit each other."""
        shape = tuple(branch.shape)
        if len(shape) not in (2, 4):
            raise ShapeError(f"ResidualTail: branch must have shape (N, C, H, W) or (N, C), got {shape}")
        if branch.dtype not in FLOATING:
            raise DtypeError(
                f"ResidualTail: branch must be float32, float64, bfloat16 or float16, got {branch.dtype}; convert it"
            )
        if shortcut is not None and tuple(shortcut.shape) != shape:
            raise ShapeError(
                f"ResidualTail: shortcut must have shape {shape} like branch, got {tuple(shortcut.shape)}; subsample "
                "and pad it, or was its projection skipped?"
            )
        if shortcut is None and carry is not None:
            raise ValueError("ResidualTail: carry must be None without a shortcut, got a tensor")
        if self.gate == "coupled" and (scale is None or shortcut is None or carry is not None):
            given = {"shortcut": shortcut, "scale": scale, "carry": carry}
            got = ", ".join(name for name, tensor in given.items() if tensor is not None) or "none of them"
            raise ValueError(f"ResidualTail: a coupled gate takes shortcut and scale, and no carry, got {got}")
        for name, gate in (("scale", scale), ("carry", carry)):
            if gate is None:
                continue
            if self.gate == "scale":
                _rows_of(name, gate, branch)
            elif tuple(gate.shape) != shape:
                raise ShapeError(f"ResidualTail: {name} must be logits of shape {shape}, got {tuple(gate.shape)}")

    def _unfused(self, branch: Tensor, shortcut: Tensor | None, scale: Tensor | None, carry: Tensor | None) -> Tensor:
        activation = nn.Identity() if self.activation is None else self.activation
        value = branch if self.norm is None else self.norm(branch)
        if self.before_add:
            value = activation(value)
        value = self._gated(value, scale, branch)
        if shortcut is not None:
            added = shortcut if self.shortcut_norm is None else self.shortcut_norm(shortcut)
            if self.gate == "coupled":
                assert scale is not None
                value = value + added * (1 - scale.sigmoid())
            else:
                value = value + self._gated(added, carry, branch)
        result: Tensor = value if self.before_add else activation(value)
        return result

    def _gated(self, value: Tensor, gate: Tensor | None, x: Tensor) -> Tensor:
        if gate is None:
            return value
        if self.gate != "scale":
            return value * gate.sigmoid()
        rows, columns = _rows_of("scale", gate, x)
        return value * gate.to(value.dtype).reshape(rows, columns, *(1,) * (x.dim() - 2))

    def _fused(self, branch: Tensor, shortcut: Tensor | None, scale: Tensor | None, carry: Tensor | None) -> Tensor:
        whole = [branch, shortcut, *((scale, carry) if self.gate != "scale" else ())]
        dtype = branch.dtype
        for tensor in whole:
            dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
        flat = branch.dim() == 2

        def image(tensor: Tensor | None) -> Tensor | None:
            tensor = None if tensor is None else tensor.to(dtype)
            return tensor[:, :, None, None] if flat and tensor is not None else tensor

        terms, norms = [], []
        for x, norm, gate in ((branch, self.norm, scale), (shortcut, self.shortcut_norm, carry)):
            settings, vectors = (None, ABSENT) if norm is None or x is None else _norm_of(norm)
            factor = logits = None
            if gate is not None and self.gate == "scale":
                factor = _factor(gate, branch, dtype)
            else:
                logits = image(gate)
            terms.append(TermTensors(image(x), *vectors, factor, logits))
            norms.append(settings)
        kind = activation_kind(self.activation)
        slope = _slope(self.activation, branch.shape[1], branch.device, arithmetic_dtype(dtype))
        backend = backend_for(branch.device)
        assert kind is not None and backend is not None
        plan = TailPlan(
            (norms[0], norms[1]), shortcut is not None, kind, self.before_add, self.gate == "coupled", backend
        )
        tensors = (*terms[0], *terms[1], slope)
        out = run_tail(plan, tensors, wants_gradients(branch, tensors))
        return out.flatten(1) if flat else out


def _reason_of_norm(norm: Any, x: Tensor) -> str | None:
    if type(norm) not in (nn.BatchNorm2d, nn.BatchNorm1d):
        return f"there is no kernel for {type(norm).__name__}"
    if (type(norm) is nn.BatchNorm1d) != (x.dim() == 2):
        return f"{type(norm).__name__} does not take {x.dim()} dimensions"
    known = next((v for v in (norm.weight, norm.running_mean) if v is not None), None)
    if known is not None and known.numel() != x.shape[1]:
        return f"{type(norm).__name__} has {known.numel()} features"
    settings, vectors = _norm_of(norm)
    if settings.batch_statistics and x.numel() == x.shape[1]:
        return "a batch of one value for each channel has no variance"
    for vector in vectors[:4]:
        if vector is not None and (vector.device != x.device or vector.dtype not in FLOATING):
            return f"{type(norm).__name__} has a tensor of {vector.dtype} on {vector.device}"
    return None


def _norm_of(norm: Any) -> tuple[TermNorm, NormTensors]:
    """Return the settings of a BatchNorm, and its tensors."""
    batch_statistics = norm.training or norm.running_mean is None or norm.running_var is None
    update = norm.training and norm.track_running_stats and norm.running_mean is not None
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return TermNorm(batch_statistics, update, norm.momentum, norm.eps), vectors


def activation_kind(module: nn.Module | None) -> str | None:
    """Return the kind of a module of values.ACTIVATIONS, None if it is none of them."""
    if type(module) in (nn.LeakyReLU, nn.PReLU):
        return "leaky_relu"
    if type(module) is nn.GELU and module.approximate != "none":
        return None
    return "identity" if module is None else _PLAIN.get(type(module))


def _slope(module: nn.Module | None, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if isinstance(module, nn.PReLU):
        return module.weight.to(dtype).expand(channels).contiguous()
    if isinstance(module, nn.LeakyReLU):
        return torch.full((channels,), module.negative_slope, device=device, dtype=dtype)
    return None


def _rows_of(name: str, scale: Tensor, branch: Tensor) -> tuple[int, int]:
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
    rows, columns = _rows_of("scale", scale, branch)
    return scale.reshape(rows, columns).to(arithmetic_dtype(dtype)).expand(rows, branch.shape[1]).contiguous()
