"""The gated residual tail as a module: what every residual block ends with, declared by its norms, gate, activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as nn_module

from fusedres.autograd import TailPlan, TermNorm, TermTensors, are_plain, count_path, run_tail, wants_gradients
from fusedres.backends import backend_for
from fusedres.errors import DtypeError, ShapeError
from fusedres.modules.calls import holds_inference_tensors, keep_reason, unusual_input
from fusedres.modules.genuine import touched
from fusedres.ops._sizes import FLOATING
from fusedres.values import arithmetic_dtype

GATES = ("scale", "logits", "coupled")

_Norm = nn.Module | None
NormTensors = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
ABSENT: NormTensors = (None, None, None, None, None)
_KINDS: dict[type[nn.Module], str] = {
    nn.Identity: "identity",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.GELU: "gelu",
}


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
        reason = self.unfused_reason(branch, shortcut, scale, carry)
        keep_reason(self, reason or "")
        if reason is not None:
            count_path("tail_unfused")
            return self._unfused(branch, shortcut, scale, carry)
        return self._fused(branch, shortcut, scale, carry)

    def unfused_reason(
        self, branch: Tensor, shortcut: Tensor | None = None, scale: Tensor | None = None, carry: Tensor | None = None
    ) -> str | None:
        """Return why torch's own operators run for these tensors, or None if the tail is fused.

        Raises: see the class.
        """
        tensors = (branch, shortcut, scale, carry)
        if any(isinstance(tensor, fx.Proxy) for tensor in tensors):
            return "torch.fx was tracing"
        self._check(*tensors)
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
        return self._reason_of_modules(branch, shortcut) or self._reason_of_inference(*tensors)

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        return self._reason_of_modules(None, None)

    def _reason_of_modules(self, branch: Tensor | None, shortcut: Tensor | None) -> str | None:
        """Return why a norm or the activation runs unfused, for these inputs or, without a branch, for any, or None."""
        if nn_module._has_any_global_hook():
            return "a global module hook is registered"
        for name, x in (("norm", branch), ("shortcut_norm", shortcut)):
            norm = getattr(self, name)
            if norm is None or (x is None and branch is not None):
                continue
            reason = touched(name, norm) or reason_of_norm(norm, x)
            if reason is not None:
                return reason
        if self.activation is None:
            return None
        return touched("activation", self.activation) or reason_of_activation(self.activation, branch)

    def _reason_of_inference(self, branch: Tensor, *others: Tensor | None) -> str | None:
        """Return that torch refuses to save or to write tensors that were made in inference mode, if it does."""
        held = [branch, *others, *self.parameters(), *self.buffers()]
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in held)
        written = any(norm is not None and norm.training for norm in (self.norm, self.shortcut_norm))
        if holds_inference_tensors(branch, tuple(held), recorded or written):
            return "a tensor was made in inference mode"
        return None

    def _check(self, branch: Tensor, shortcut: Tensor | None, scale: Tensor | None, carry: Tensor | None) -> None:
        """Raise where the tensors do not fit each other."""
        shape = tuple(branch.shape)
        if len(shape) not in (2, 4):
            raise ShapeError(f"ResidualTail: branch must have shape (N, C, H, W) or (N, C), got {shape}")
        for name, tensor in (("branch", branch), ("shortcut", shortcut), ("scale", scale), ("carry", carry)):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise DtypeError(f"ResidualTail: {name} must be a tensor, got a {type(tensor).__name__}")
            if tensor is not None and tensor.dtype not in FLOATING:
                raise DtypeError(
                    f"ResidualTail: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}; "
                    "convert it first"
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
        terms, norms = [], []
        for x, norm, gate in ((branch, self.norm, scale), (shortcut, self.shortcut_norm, carry)):
            settings, vectors = (None, ABSENT) if norm is None or x is None else norm_of(norm)
            factor = logits = None
            if gate is not None and self.gate == "scale":
                factor = _factor(gate, branch, dtype)
            else:
                logits = None if gate is None else gate.to(dtype)
            terms.append(TermTensors(None if x is None else x.to(dtype), *vectors, factor, logits))
            norms.append(settings)
        kind = "identity" if self.activation is None else _KINDS[type(self.activation)]
        slope = _slope(self.activation, branch.shape[1], branch.device, arithmetic_dtype(dtype))
        backend = backend_for(branch.device)
        assert backend is not None
        plan = TailPlan(
            (norms[0], norms[1]), shortcut is not None, kind, self.before_add, self.gate == "coupled", backend
        )
        tensors = (*terms[0], *terms[1], slope)
        return run_tail(plan, tensors, wants_gradients(branch, tensors))


# The forwards that a fused tail does not call.
_FORWARDS = {
    kind: kind.forward
    for kind in (nn.BatchNorm2d, nn.BatchNorm1d, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.ReLU, nn.SiLU, nn.Hardswish,
                 nn.GELU)
}  # fmt: skip


def reason_of_norm(norm: Any, x: Tensor | None) -> str | None:
    """Return why a norm of x, or of any x for None, runs unfused, or None."""
    name = type(norm).__name__
    if type(norm) not in (nn.BatchNorm2d, nn.BatchNorm1d):
        return f"there is no kernel for {name}"
    if type(norm).forward is not _FORWARDS[type(norm)]:
        return f"{name}.forward is replaced"
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
    plain = are_plain(vector) and vector.dim() == 1 and vector.is_contiguous() and vector.numel() == x.shape[1]
    return plain and vector.device == x.device and vector.dtype in FLOATING


def norm_of(norm: Any) -> tuple[TermNorm, NormTensors]:
    """Return the settings of a BatchNorm, and its tensors."""
    batch_statistics = norm.training or (norm.running_mean is None and norm.running_var is None)
    update = norm.training and norm.track_running_stats and norm.running_mean is not None
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return TermNorm(batch_statistics, update, norm.momentum, norm.eps), vectors


def reason_of_activation(module: Any, x: Tensor | None) -> str | None:
    """Return why an activation of x, or of any x for None, runs unfused, or None."""
    name = type(module).__name__
    if type(module) not in _KINDS or (type(module) is nn.GELU and module.approximate != "none"):
        return f"there is no kernel for {module}"
    if type(module).forward is not _FORWARDS[type(module)]:
        return f"{name}.forward is replaced"
    if type(module) is not nn.PReLU or x is None:
        return None
    weight = module.weight
    if not are_plain(weight) or weight.numel() not in (1, x.shape[1]) or weight.device != x.device:
        return f"{name} has no plain weight of 1 or {x.shape[1]} numbers on {x.device}"
    if torch.is_autocast_enabled(x.device.type):
        return f"autocast chooses the dtype of {name}"
    return None


def _slope(module: Any, channels: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if type(module) is nn.PReLU:
        weight: Tensor = module.weight
        return weight.to(dtype).expand(channels).contiguous()
    if type(module) is nn.LeakyReLU:
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
