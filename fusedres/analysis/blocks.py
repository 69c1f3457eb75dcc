"""Takes residual blocks apart: out = after(F(x) + S(x)), with F the branch and S the shortcut, for blocks of any class.

A copy of the block is traced by torch.fx (tracing.py). The last sum before its result is the residual add, and the term
that passes the fewest convolutions, linear layers and parameters is the shortcut. A term that is such a sum itself is
taken apart too: of a Transformer's layer, x + F_1(x) + F_2(x + F_1(x)), the shortcut is x and the branch is the rest.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor, fx, nn

from fusedres.analysis.tracing import Term, Traced, add_before, needed_for, terms_of, trace
from fusedres.modules import PlainBlock, StochasticDepth

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_BLOCK_NAME = re.compile(r"block|layer|bottle\w?neck|unit|residual", re.IGNORECASE)
_NAMED = 3  # modules that a warning names


class ResidualBlock:
    """A block of a model, taken apart; a block without a shortcut has a branch only.

    Attributes:
        name: of the module in the model.
        module: the block. Its parts run the same submodules with PyTorch's own operators.
    """

    def __init__(self, name: str, module: nn.Module, traced: Traced, add: fx.Node | None) -> None:
        self.name, self.module = name, module
        self._traced, self._add = traced, add
        terms = [Term(traced.result)] if self._add is None else terms_of(traced, Term(self._add))
        chosen = None if self._add is None else min(terms, key=self._cost)
        self._shortcut = [term for term in terms if term == chosen]
        self._branch = [term for term in terms if term != chosen]

    @property
    def has_shortcut(self) -> bool:
        """Whether something is added to the branch."""
        return bool(self._shortcut)

    @property
    def is_identity(self) -> bool:
        """Whether the shortcut is the block's input itself."""
        return len(self._shortcut) == 1 and self._shortcut[0].node is self._traced.input

    def branch(self, x: Tensor) -> Tensor:
        """Return F(x); of a block without a shortcut, its output."""
        return self._sum(self._branch, x)

    def shortcut(self, x: Tensor) -> Tensor:
        """Return S(x)."""
        return self._sum(self._shortcut, x)

    def after(self, total: Tensor, x: Tensor) -> Tensor:
        """Return what the block makes of the sum F(x) + S(x); x gives sizes only."""
        if self._add is None:
            return total
        return self._traced.value(self._traced.result, {self._add: total, self._traced.input: x.detach()})

    def apply(self, of_branch: Tensor, of_shortcut: Tensor) -> Tensor:
        """Return after(F(x_b) + S(x_s)): the block's output, if both are its input x."""
        if not self.has_shortcut:
            return self.branch(of_branch)
        return self.after(self.branch(of_branch) + self.shortcut(of_shortcut), of_branch)

    def without_branch(self, x: Tensor) -> Tensor:
        """Return after(S(x)), the block with its branch deleted; of a block without a shortcut, x."""
        return self.after(self.shortcut(x).clone(), x) if self.has_shortcut else x

    def adds_itself(self, inner: Sequence[str]) -> bool:
        """Whether the add is the block's own, and its shortcut does not pass the modules at these paths below it."""
        if self._add is None:
            return False
        shortcut = [node for term in self._shortcut for node in needed_for(term.node, {})]
        return not any(self._traced.is_below(node, path) for node in [self._add, *shortcut] for path in inner)

    def adds_beside_weights(self) -> bool:
        """Whether the module whose forward adds, the block or a tail in it, has no weights besides the block's own."""
        return self._add is not None and not self._traced.is_in_weighted_part(self._add)

    def _sum(self, terms: Sequence[Term], x: Tensor) -> Tensor:
        total = self._traced.of_term(terms[0], x)
        for term in terms[1:]:
            total = total + self._traced.of_term(term, x)
        return total

    def _cost(self, term: Term) -> tuple[int, int, int]:
        """Return how many convolutions and linear layers, nodes with parameters, and nodes a term is made of."""
        nodes = needed_for(term.node, {self._traced.input: None})
        weighted = sum(map(self._traced.is_weighted, nodes))
        return weighted, sum(map(self._traced.has_parameters, nodes)), len(nodes)


def take_apart(name: str, module: nn.Module) -> ResidualBlock | str:
    """Return a block taken apart, or why that cannot be done, in words. The module stays as it was."""
    traced = trace(module)
    if isinstance(traced, str):
        return traced
    add = add_before(traced)
    known = {add: None, traced.input: None}
    if add is not None and any(map(traced.is_weighted, needed_for(traced.result, known))):
        return "convolutions or linear layers stand after its last sum"
    return ResidualBlock(name, module, traced, add)


def residual_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[ResidualBlock]:
    """Return the residual blocks of a model, taken apart, in the order of its modules; see the head of this file.

    The model stays as it was: copies are traced.

    Args:
        model: any module, fused or not.
        names: of the modules that are the blocks; one without a sum is a block without a shortcut. None: PlainBlock,
            and the modules that add a shortcut to a branch themselves, the outer one where one is in another's branch.

    Warns:
        modules that have names of blocks and cannot be traced were left out.

    Raises:
        TypeError: model is not a module.
        ValueError: there are no such blocks, or one of the names is none, and why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"residual_blocks: model must be a torch.nn.Module, got {type(model).__name__}")
    modules = dict(model.named_modules())
    if names is not None:
        return [_named(modules, name) for name in names]
    found: dict[str, ResidualBlock] = {}
    untraced: dict[str, str] = {}
    for name, module in modules.items():
        if isinstance(module, _CONTAINERS) or not any(True for _ in module.children()):
            continue
        block = take_apart(name, module)
        if isinstance(block, str):
            untraced[name] = block
            if isinstance(module, StochasticDepth):
                raise ValueError(
                    f"residual_blocks: {name} must not drop its branch, got rate {module.rate}; call model.eval()"
                )
        elif isinstance(module, PlainBlock) or block.adds_beside_weights():
            found[name] = block
    chosen = _chosen(found)
    left_out = {
        name: reason
        for name, reason in untraced.items()
        if _BLOCK_NAME.search(type(modules[name]).__name__) and not any(_is_inside(name, other) for other in chosen)
    }
    said = "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(left_out.items())[:_NAMED])
    if not chosen:
        raise ValueError(
            f"residual_blocks: {type(model).__name__} must have modules that add a shortcut to a branch, got none that "
            f"can be taken apart{f' ({said})' if said else ''}; give names, to see why a module is none"
        )
    if left_out:
        warnings.warn(f"residual_blocks: {len(left_out)} modules were left out ({said})", stacklevel=2)
    return list(chosen.values())


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model; of a compiled one, of what was compiled.

    Raises: ValueError: it cannot be copied.
    """
    model = getattr(model, "_orig_mod", model)
    try:
        return copy.deepcopy(model)
    except Exception as error:  # a module may hold anything
        reason = " ".join(str(error).split())[:120]
        kind = type(model).__name__
        raise ValueError(f"analysis: {kind} must be a model that can be copied, got: {reason}") from error


def _chosen(found: Mapping[str, ResidualBlock]) -> dict[str, ResidualBlock]:
    """Return the blocks that are in no other: a block goes before those in its branch, else they go before it."""
    chosen: dict[str, ResidualBlock] = {}
    for name, block in found.items():  # the outer ones first
        if any(_is_inside(name, other) for other in chosen):
            continue
        inner = [other for other in found if other != name and _is_inside(other, name)]
        below = [other.removeprefix(f"{name}." if name else "") for other in inner]
        if not inner or block.adds_itself(below):
            chosen[name] = block
    return chosen


def _named(modules: Mapping[str, nn.Module], name: str) -> ResidualBlock:
    if name not in modules:
        raise ValueError(f"residual_blocks: names must be those of modules of the model, got {name!r}")
    block = take_apart(name, modules[name])
    if isinstance(block, str):
        kind = type(modules[name]).__name__
        raise ValueError(f"residual_blocks: {name or 'the model'} (a {kind}) must be a residual block: {block}")
    return block


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name == outer or name.startswith(f"{outer}.")
