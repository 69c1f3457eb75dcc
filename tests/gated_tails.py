"""Residual tails to test: every block of the family, and float64 autograd of the tail's equation as the oracle."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from op_inputs import activation, state, vector
from torch import Tensor
from torch.nn import functional as F

from fusedres.values import Activation, TailTerm


class Tail(NamedTuple):
    """What a tail has, by name; see `make`."""

    kind: str = "identity"
    before_add: bool = False
    branch: str = ""  # of: state, channel, sample, logits
    shortcut: str | None = ""
    coupled: bool = False
    masked: bool = False  # the ReLU's bits are kept


# Each block of the family, then what they do not have.
TAILS = {
    "resnet": Tail("relu", branch="state", masked=True),
    "projection": Tail("relu", branch="state", shortcut="state", masked=True),
    "recomputed": Tail("relu", branch="state", shortcut="state"),
    "pre-activation": Tail(),
    "highway": Tail("relu", True, "logits", coupled=True),
    "highway after BatchNorm": Tail("silu", True, "state logits", coupled=True),
    "squeeze-and-excitation": Tail("relu", branch="state sample", masked=True),
    "layer scale": Tail(branch="state channel"),
    "stochastic depth": Tail("relu", branch="state sample"),
    "yolo": Tail("silu", True, "state"),
    "convolution, BatchNorm, SiLU": Tail("silu", True, "state", None),
    "no shortcut, after": Tail("gelu", branch="state", shortcut=None),
    "prelu": Tail("leaky_relu", branch="state", shortcut="state"),
    "prelu before": Tail("leaky_relu", True, "state channel", "channel"),
    "leaky, kept": Tail("leaky_relu", branch="state", masked=True),
    "hardswish": Tail("hardswish", branch="state", shortcut=""),
    "hardswish before": Tail("hardswish", True, "state sample", "state"),
    "gelu": Tail("gelu", branch="", shortcut="state channel"),
    "two gates": Tail("silu", branch="state logits", shortcut="state logits"),
    "factors of both": Tail("gelu", True, "state sample", "state channel"),
    "only gates": Tail("relu", branch="sample", shortcut="sample", masked=True),
}


def _term(what: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> TailTerm:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    rows = {"channel": 1, "sample": shape[0]}
    kind = next((word for word in what.split() if word in rows), None)
    generator = torch.Generator().manual_seed(seed)
    factor = None
    if kind is not None:
        factor = torch.randn(rows[kind], shape[1], generator=generator, dtype=torch.float64).to(wide)
    logits = activation(shape, dtype, seed + 1) if "logits" in what else None
    return TailTerm(
        activation(shape, dtype, seed + 2), state(shape[1], dtype, seed) if "state" in what else None, factor, logits
    )


def make(tail: Tail, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> dict[str, Any]:
    """Return the terms and the activation of a tail."""
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    branch = _term(tail.branch, shape, dtype, 20)
    shortcut = None if tail.shortcut is None else _term(tail.shortcut, shape, dtype, 40)
    slope = (vector(shape[1], wide, 5) / 3).to(where) if tail.kind == "leaky_relu" else None
    terms = [
        None if term is None else TailTerm(*(None if t is None else t.to(where) for t in term))
        for term in (branch, shortcut)
    ]
    return {
        "branch": terms[0], "shortcut": terms[1], "activation": Activation(tail.kind, slope, tail.before_add),
        "coupled": tail.coupled,
    }  # fmt: skip


def act(z: Tensor, activation: Activation) -> Tensor:
    plain = {"identity": lambda v: v, "relu": F.relu, "silu": F.silu, "hardswish": F.hardswish, "gelu": F.gelu}
    if activation.slope is not None:
        return F.prelu(z, activation.slope) if z.shape[1] == activation.slope.numel() else z
    return plain[activation.kind](z)


def normalised(term: TailTerm) -> Tensor:
    if term.state is None:
        return term.x
    _, _, scale, shift = (row.view(1, -1, 1, 1) for row in term.state)
    return term.x * scale + shift


def equation(branch: TailTerm, shortcut: TailTerm | None, activation: Activation, coupled: bool) -> Tensor:
    """Return out, by the equation of ops.gated_tail."""
    gates = [None if term is None or term.logits is None else term.logits.sigmoid() for term in (branch, shortcut)]
    if coupled:
        gates[1] = 1 - gates[0]
    total = torch.zeros((), dtype=branch.x.dtype, device=branch.x.device)
    for index, term in enumerate((branch, shortcut)):
        if term is None:
            continue
        value = normalised(term)
        if index == 0 and activation.before_add:
            value = act(value, activation)
        if term.factor is not None:
            value = value * term.factor[:, :, None, None]
        if gates[index] is not None:
            value = value * gates[index]
        total = total + value
    return total if activation.before_add else act(total, activation)


def doubled(made: dict[str, Any]) -> dict[str, Any]:
    """Return the same in float64, with every tensor a leaf that requires its gradient."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().double().requires_grad_()

    terms = {name: None if made[name] is None else TailTerm(*map(leaf, made[name])) for name in ("branch", "shortcut")}
    kind, slope, before_add = made["activation"]
    return terms | {"activation": Activation(kind, leaf(slope), before_add), "coupled": made["coupled"]}


def terms_of(made: dict[str, Any]) -> Tensor:
    """Return the sum of the magnitudes that the forward adds up."""
    exact = doubled(made)
    magnitude = torch.zeros(())
    for name in ("branch", "shortcut"):
        term = exact[name]
        if term is None:
            continue
        value = term.x.abs()
        if term.state is not None:
            value = value * term.state[2].abs().view(1, -1, 1, 1) + term.state[3].abs().view(1, -1, 1, 1)
        if term.factor is not None:
            value = value * term.factor.abs()[:, :, None, None]
        magnitude = magnitude + value
    return magnitude.detach() + 1e-6


class Exact(NamedTuple):
    """The float64 gradients of a tail."""

    grad: Tensor  # of out, in the tested dtype, 0 where rounding decides about the activation's side
    branch: Tensor  # of the normalised x of the branch
    shortcut: Tensor | None
    leaves: dict[str, Any]  # as in `doubled`, with their gradients


def exact_gradients(made: dict[str, Any], grad: Tensor) -> Exact:
    leaves = doubled(made)
    values = []
    for name in ("branch", "shortcut"):
        term = leaves[name]
        values.append(None if term is None else normalised(term).detach().requires_grad_())
    plain = [
        None if value is None else TailTerm(value, None, leaves[name].factor, leaves[name].logits)
        for name, value in zip(("branch", "shortcut"), values, strict=True)
    ]
    kind, _, before_add = activation_ = leaves["activation"]
    argument = values[0] if before_add else equation(*plain, Activation(), leaves["coupled"])
    kinks = {"relu": (0.0,), "leaky_relu": (0.0,), "hardswish": (-3.0, 3.0)}.get(kind, ())
    near = 64 * torch.finfo(torch.float32).eps * terms_of(made)
    for kink in kinks:
        grad = grad.masked_fill((argument.detach() - kink).abs() <= near, 0)
    grad = grad.contiguous(memory_format=torch.channels_last)
    equation(*plain, activation_, leaves["coupled"]).backward(grad.double())
    return Exact(grad, values[0].grad, None if values[1] is None else values[1].grad, leaves)
