"""Switch a model's residual blocks and stem to fused ones and back, and report what runs fused."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

from torch import nn
from torchvision.models.resnet import ResNet

from fusedres.autograd import Frozen
from fusedres.modules import FusedBlock, FusedStem
from fusedres.modules.anatomy import SHARDED
from fusedres.modules.classes import (
    base_of,
    fused_class,
    is_fused,
    own_method,
    own_method_of_fused,
    refusals,
    stock_class,
)
from fusedres.modules.families import has_stem, looks_residual, read, read_network, why_unknown
from fusedres.modules.frozen_network import FrozenModel
from fusedres.modules.frozen_norm import recognise_frozen_norms
from fusedres.modules.fused_block import FusedForeignBlock
from fusedres.modules.genuine import replaced_on_block
from fusedres.modules.norm_act_conv import NormActConv
from fusedres.modules.parts import Parts
from fusedres.modules.postactivation import PostActBlock
from fusedres.modules.preactivation import PreActBlock
from fusedres.modules.resnet import FusedForeignStem
from fusedres.modules.scripting import restore
from fusedres.modules.stochastic_depth import StochasticRate, check_rate, refuse_dropping
from fusedres.modules.tail import ResidualTail
from fusedres.modules.tail_block import FusedTailBlock

_MEMORY = ("auto", "min")
_CONV = ("auto", "library", "fused")
_DECLARED = (NormActConv, PreActBlock, PostActBlock, ResidualTail)  # modules that fuse() need not switch
_OPTIONS = (
    "fused_memory",
    "fused_conv",
    "fused_frozen",
    "fused_last_reason",
    "fused_calls",
    "fused_stochastic_depth",
    "_parts",
)


class BlockReport(NamedTuple):
    """One residual block or stem: its name in the model, its kind, whether it runs fused, and if not, why."""

    name: str
    kind: str
    fused: bool
    reason: str


class Report(list[BlockReport]):
    """The stems and residual blocks of a model in order; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no residual blocks"
        rows = [("block", "kind", "fused", "reason")]
        rows += [(block.name, block.kind, "yes" if block.fused else "no", block.reason) for block in self]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        rows.insert(1, tuple("-" * width for width in widths))  # type: ignore[arg-type]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)


def fuse(
    model: nn.Module,
    *,
    filter: Callable[[str, nn.Module], bool] | None = None,
    memory: str = "auto",
    conv: str = "auto",
    stochastic_depth: float = 0.0,
    stochastic_mode: str = "row",
) -> nn.Module:
    """Make the residual blocks and the stem of a network run fused, in place: torchvision's, or one of a known class.

    docs/compatibility.md lists the known classes; `register` adds others. YOLO's convolutions and bottlenecks keep
    their convolutions, and each BatchNorm is fused with the activation and the sum after it. The dense blocks and
    transitions of torchvision's DenseNets are switched in the same way. The stem is convolution, BatchNorm, ReLU and
    max-pool. Only the class of the blocks and of the network changes. Parameters and buffers stay the same objects, so
    an existing optimizer stays valid. Hooks on the block, train/eval state, dtype, device, memory format and
    requires_grad stay. deepcopy, pickle and torch.save work. Subclasses without their own forward (isinstance still
    holds) and modules that DistributedDataParallel, FullyShardedDataParallel or fully_shard wrapped are switched too.
    Blocks and stems with unusual parts run their stock forward; see `report`.

    "auto" follows the device's table of measured choices (`python -m fusedres tune`). The choice depends on the shape
    of the block, the batch, the dtype, and whether gradients are recorded. If both options are "auto" and no backend is
    selected, a shape that is fastest unfused runs the stock forward. Without a table, CPUs run the library's
    convolutions with everything else fused. GPUs without a table run Triton's kernels if conv or memory is given; with
    both "auto" they run the stock forward and a warning says so.

    Args:
        model: any module; every residual block of a known class, and every network that begins with a stem, is
            switched, model itself included.
        filter: filter(name, module) → bool selects the blocks, and the networks to get a fused stem; None: all.
        memory: "min": never save the output of a 1x1 convolution that ends a branch (ops.one_pass; in 16 bits on a CPU
            it is computed again in backward), and fuse the tails of tensors that are not channels_last, too, though
            they are slower on a CPU; "auto": do this only if it was measured faster.
        conv: which convolutions run. "library": torch's. "fused": this package's, with BatchNorm and ReLU applied as
            they load and store; not on the cpu backend, and in a stem only if it was measured faster there. "auto": for
            each product the one that was measured faster, see above; without measurements the library's.
        stochastic_depth: how often the last block drops its branch in training; block l of L does so with l / L times
            this rate (Huang et al. 2016). See StochasticDepth.
        stochastic_mode: "row": each sample drops by itself; "batch": the whole batch does.

    Returns:
        model itself.

    Warns:
        nothing was changed, because of the first reason that `report` gives.

    Raises:
        TypeError: model is not a module.
        ValueError: an option is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    if memory not in _MEMORY:
        raise ValueError(f"fuse: memory must be one of {', '.join(_MEMORY)}, got {memory!r}")
    if conv not in _CONV:
        raise ValueError(f"fuse: conv must be one of {', '.join(_CONV)}, got {conv!r}")
    check_rate("fuse", stochastic_depth, stochastic_mode, "stochastic_depth")
    switched = []
    for name, block in model.named_modules():
        restore(block)
        if _unfusable(block) is None and (filter is None or filter(name, block)):
            _switch(block, {"fused_memory": memory, "fused_conv": conv})
            switched.append(block)
    _set_rates(switched, stochastic_depth, stochastic_mode)
    if filter is None and not any(is_fused(type(block)) for block in model.modules()):
        rows = report(model)
        first = next((row for row in rows if not row.fused), None)
        because = "it has no residual blocks" if not rows else "its blocks need no fuse()"
        because = because if first is None else f"{first.name}: {first.reason}"
        warnings.warn(f"fuse: nothing in {type(model).__name__} was changed; {because}; see report()", stacklevel=2)
    return model


def _switch(block: nn.Module, options: dict[str, str]) -> None:
    """Give a block or a ResNet its fused class if it can have one, and the options of fuse()."""
    recognise_frozen_norms(block)
    cls, base = type(block), _base(block)
    assert base is not None
    parts = _read(block)
    if isinstance(parts, str):  # not such a block, or no longer
        block.__class__ = stock_class(cls)
        return
    if not is_fused(cls):
        wanted = FusedTailBlock if parts is not None and parts.steps else base
        fused = None if replaced_on_block(block.__dict__) is not None else fused_class(cls, wanted)
        if fused is None:
            return
        block.__class__ = fused
    if isinstance(block, FusedStem) and options["fused_conv"] == "fused":
        options = options | {"fused_conv": "measured"}
    block.__dict__ |= options if parts is None else options | {"_parts": parts}


def _set_rates(modules: list[nn.Module], rate: float, mode: str) -> None:
    """Set the rates of stochastic depth of fused blocks in order."""
    blocks = [block for block in modules if isinstance(block, FusedBlock)]
    if rate and not blocks:
        warnings.warn("fuse: stochastic_depth has no effect: no block with units was switched", stacklevel=3)
    for index, block in enumerate(blocks, 1):
        parts = block.__dict__.get("_parts", type(block)._parts)
        reason = refuse_dropping(parts) if rate else None
        if reason is not None:
            warnings.warn(f"fuse: a {type(block).__name__} has no stochastic depth: {reason}", stacklevel=3)
        dropping = rate and reason is None
        block.__dict__.pop("fused_stochastic_depth", None)
        if dropping:
            block.fused_stochastic_depth = StochasticRate(rate * index / len(blocks), mode)


def unfuse(model: nn.Module) -> nn.Module:
    """Undo `fuse` in place and return model: every fused block and ResNet gets its earlier class back.

    A block that was built from a fused class gets torchvision's class. Users' subclasses of fused classes stay.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"unfuse: model must be a torch.nn.Module, got {type(model).__name__}")
    for block in model.modules():
        restore(block)
        if is_fused(type(block)) and stock_class(type(block)) is not type(block):
            block.__class__ = stock_class(type(block))
            for option in _OPTIONS:
                block.__dict__.pop(option, None)
    return model


def freeze(model: nn.Module) -> nn.Module:
    """Fold the weights of a fused model for inference, in place: the caller promises that they no longer change.

    Without freeze, BatchNorm is applied from the current weights at every call, so nothing can be out of date. Frozen
    blocks and stems fold BatchNorm into the convolutions (in float32 or wider) and rearrange the weights at their next
    call. On a CPU, ReLU and shortcut are then part of the convolutions' stores, and a torchvision ResNet runs as a
    whole, a few images at a time, with its classifier, unless a hook or other code has to see its modules being called.
    Folds are used until model.train() drops them. Copies and pickles of a frozen model are not frozen. Calls that need
    gradients, and blocks with batch statistics in BatchNorm, run as if they were not frozen.

    Args:
        model: a module in eval mode that was fused before.

    Returns:
        model itself.

    Raises:
        TypeError: model is not a module.
        ValueError: a fused block is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        restore(module)
    blocks = [(name, block) for name, block in model.named_modules() if isinstance(block, FusedBlock)]
    for name, block in blocks:
        if block.training:
            raise ValueError(f"freeze: {name or 'the block'} must be in eval mode; call model.eval() first")
    for _, block in blocks:
        block.fused_frozen = Frozen()
    for network in model.modules():
        if isinstance(network, FusedStem) and not network.training:
            network.fused_frozen = FrozenModel()
    return model


def report(model: nn.Module) -> Report:
    """Return for each stem and residual block of a model whether it runs fused now, and if not, the exact reason.

    A block is not fused if its parts are unusual, if code that it would bypass was replaced, if a batch of images would
    raise an error, or if its last input ran unfused (a tensor subclass, a transform of torch.func). The report has no
    input, so it does not ask the table of measured choices, which may also leave a shape unfused (see `fuse`).
    A ResNet's stem has the name "<name> stem" and the kind "stem". The modules of this package that need no fuse(),
    such as ResidualTail, have a row too; so have modules of unknown classes that have the looks of a residual block:
    the reason says whether `register` would help.

    Raises:
        TypeError: model is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"report: model must be a torch.nn.Module, got {type(model).__name__}")
    rows = Report()
    inside: str | None = None  # the last residual-looking block of an unknown class
    for name, block in model.named_modules():
        restore(block)
        base = _base(block)
        if isinstance(block, _DECLARED):
            reason = block.standing_reason() or _last_reason(block)
            rows.append(BlockReport(name or "(model)", type(block).__name__, reason is None, reason or ""))
        elif base is None:
            if looks_residual(block) and (inside is None or not name.startswith(inside)):
                inside = f"{name}." if name else ""
                rows.append(BlockReport(name or "(model)", type(block).__name__, False, why_unknown(block)))
        else:
            reason = _reason(block)
            kind, suffix = ("stem", " stem") if base in (ResNet, FusedForeignStem) else (_kind(type(block), base), "")
            rows.append(BlockReport((name or "(model)") + suffix, kind, reason is None, reason or ""))
    return rows


def _kind(cls: type[nn.Module], base: type[nn.Module]) -> str:
    return stock_class(cls).__name__ if base in (nn.Module, FusedTailBlock) else base.__name__


def _base(block: nn.Module) -> type[nn.Module] | None:
    """Return the result of base_of for a block, or FusedForeignStem for a network whose stem may be fused."""
    cls, base = type(block), base_of(type(block))
    foreign = base is None or (base is ResNet and not is_fused(cls) and own_method(cls, base) == "forward")
    return FusedForeignStem if foreign and has_stem(block) else base


def _read(block: nn.Module) -> Parts | str | None:
    """Return what the forward of a block or a network says, or why it is not fused; None: a class of torchvision."""
    base = _base(block)
    if base is FusedForeignStem:
        return read_network(block)
    if isinstance(block, FusedForeignBlock | FusedTailBlock):
        return type(block)._read(block)
    return read(block) if base is nn.Module else None


def _unfusable(block: nn.Module) -> str | None:
    """Return why fuse() leaves modules of a block's class unchanged, or None if it sets their class or options."""
    cls, base = type(block), _base(block)
    if base is None:
        return "it is not a residual block"
    if is_fused(cls):
        return None
    method = own_method(cls, base)
    if method is not None:
        return _has_its_own(cls, method)
    return refusals.get(cls)


def _reason(block: nn.Module) -> str | None:
    """Return why a block or a stem does not run fused, or None if it does."""
    cls = type(block)
    reason = replaced_on_block(block.__dict__)
    if reason is not None:
        return reason
    if not is_fused(cls):
        return _unfusable(block) or _unreadable(block) or "not selected by fuse()"
    method = own_method_of_fused(cls)
    if method is not None:
        return _has_its_own(cls, method)
    found: str | None = block.stem_unfused_reason() if isinstance(block, FusedStem) else block.unfused_reason()  # type: ignore[operator]
    if found is not None and found.endswith(SHARDED):
        fused = block.__dict__.get("fused_last_reason") == ""
        return None if fused else f"{found}: fused where it is gathered for a call"
    return found or _last_reason(block)


def _last_reason(block: nn.Module) -> str | None:
    """Return why the last input of a block ran unfused, or None."""
    last = block.__dict__.get("fused_last_reason")  # "" if the last call ran fused
    return f"its last input ran unfused: {last}" if last else None


def _unreadable(block: nn.Module) -> str | None:
    """Return why a block of a declared class is no fused block's computation, or None."""
    parts = _read(block)
    return parts if isinstance(parts, str) else None


def _has_its_own(cls: type[nn.Module], method: str) -> str:
    return f"{cls.__module__}.{cls.__qualname__} is a subclass with a {method} of its own"
