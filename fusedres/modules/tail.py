"""The gated residual tail as a module: what every residual block ends with, declared by its norms, gate, activation."""

from __future__ import annotations

from torch import Tensor, fx, nn

from fusedres.autograd import count_path
from fusedres.errors import DtypeError, ShapeError
from fusedres.modules.calls import keep_reason
from fusedres.modules.tail_running import (
    TailModules,
    reason_of_call,
    reason_of_modules,
    rows_of,
    run_fused,
    run_unfused,
)
from fusedres.ops._sizes import FLOATING

GATES = ("scale", "logits", "coupled")

_Norm = nn.Module | None


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
        return run_fused(self._modules_of_tail(), branch, shortcut, scale, carry)

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
        return reason_of_call(self._modules_of_tail(), *tensors)

    def standing_reason(self) -> str | None:
        """Return why no input runs fused, or None."""
        return reason_of_modules(self._modules_of_tail(), None, None)

    def _modules_of_tail(self) -> TailModules:
        return TailModules(self.norm, self.shortcut_norm, self.activation, self.before_add, self.gate)

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
                rows_of(name, gate, branch)
            elif tuple(gate.shape) != shape:
                raise ShapeError(f"ResidualTail: {name} must be logits of shape {shape}, got {tuple(gate.shape)}")

    def _unfused(self, branch: Tensor, shortcut: Tensor | None, scale: Tensor | None, carry: Tensor | None) -> Tensor:
        return run_unfused(self._modules_of_tail(), branch, shortcut, scale, carry)
