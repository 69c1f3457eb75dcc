"""Takes residual blocks apart: out = after(F(x) + S(x)), with F the branch and S the shortcut, for blocks of any class.

A block's forward is traced by torch.fx. The last sum before its result is the residual add, and the term that passes
the fewest parameters is the shortcut. A term that is such a sum itself is taken apart too, so that for a Transformer's
layer, x + F_1(x) + F_2(x + F_1(x)), the shortcut is x and the branch is the rest.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from fusedres.modules import PlainBlock, StochasticDepth

_ADDS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
_SIZES = {"call_function": (getattr,), "call_method": ("size", "dim")}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


class ResidualBlock:
    """A block of a model, taken apart; a block without a shortcut has a branch only.

    Attributes:
        name: of the module in the model.
        module: the block. Its parts run the same submodules with PyTorch's own operators.
    """

    def __init__(self, name: str, module: nn.Module, graph: fx.GraphModule, terms: Sequence[fx.Node]) -> None:
        self.name, self.module = name, module
        self._graph = graph
        self._input = next(node for node in graph.graph.nodes if node.op == "placeholder")
        others = (node for node in graph.graph.nodes if node.op == "placeholder" and node is not self._input)
        self._defaults = {node: node.args[0] for node in others}
        self._result: Any = next(node for node in graph.graph.nodes if node.op == "output").args[0]
        self._add = None if len(terms) == 1 else _add_before(self._result, _dependent(self._input))
        self._shortcut = None if len(terms) == 1 else min(terms, key=self._cost)
        self._branch = [term for term in terms if term is not self._shortcut]

    @property
    def has_shortcut(self) -> bool:
        """Whether something is added to the branch."""
        return self._shortcut is not None

    @property
    def is_identity(self) -> bool:
        """Whether the shortcut is the block's input itself."""
        node = self._shortcut
        while node is not None and node.op == "call_module" and self._is_identity_module(node):
            node = node.all_input_nodes[0]
        return node is self._input

    @property
    def ends_with_add(self) -> bool:
        """Whether nothing acts after the add."""
        return self._add is not None and self._add is self._result

    def branch(self, x: Tensor) -> Tensor:
        """Return F(x); of a block without a shortcut, its output."""
        total = self._value(self._branch[0], {self._input: x})
        for term in self._branch[1:]:
            total = total + self._value(term, {self._input: x})
        return total

    def shortcut(self, x: Tensor) -> Tensor:
        """Return S(x)."""
        return self._value(self._shortcut, {self._input: x})

    def after(self, total: Tensor, x: Tensor) -> Tensor:
        """Return what the block makes of the sum F(x) + S(x); x gives sizes only."""
        if self._add is None:
            return total
        return self._value(self._result, {self._add: total, self._input: x.detach()})

    def apply(self, of_branch: Tensor, of_shortcut: Tensor) -> Tensor:
        """Return after(F(x_b) + S(x_s)): the block's output, if both are its input x."""
        if self._shortcut is None:
            return self.branch(of_branch)
        return self.after(self.branch(of_branch) + self.shortcut(of_shortcut), of_branch)

    def without_branch(self, x: Tensor) -> Tensor:
        """Return after(S(x)), the block with its branch deleted; of a block without a shortcut, x."""
        return x if self._shortcut is None else self.after(self.shortcut(x).clone(), x)

    def _value(self, wanted: Any, known: Mapping[fx.Node, Any]) -> Any:
        """Return the value of a node, from the values of others."""
        interpreter = fx.Interpreter(self._graph, garbage_collect_values=False)
        interpreter.env = {**self._defaults, **known}
        for node in _before(wanted, interpreter.env):
            interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[wanted]

    def _cost(self, term: fx.Node) -> tuple[int, int]:
        """Return how many nodes with parameters, and how many at all, a term is made of."""
        nodes = _before(term, {self._input: None})
        return sum(map(self._has_parameters, nodes)), len(nodes)

    def _is_identity_module(self, node: fx.Node) -> bool:
        return isinstance(self._graph.get_submodule(str(node.target)), nn.Identity)

    def _has_parameters(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(True for _ in self._graph.get_submodule(str(node.target)).parameters())
        return node.op == "get_attr"


def take_apart(name: str, module: nn.Module) -> ResidualBlock | str:
    """Return a block taken apart, or why that cannot be done, in words."""
    try:
        graph = fx.symbolic_trace(module)
    except Exception as error:  # a forward may do anything with what torch.fx gives it
        return f"torch.fx cannot trace its forward: {' '.join(str(error).split())[:120]}"
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    result = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    if len([node for node in inputs if not node.args]) != 1 or not isinstance(result, fx.Node):
        return "its forward does not turn one tensor into one tensor"
    dependent = _dependent(inputs[0])
    add = _add_before(result, dependent)
    terms = [result] if add is None else _terms(add, dependent)
    if add is not None and any(_is_weighted(graph, node) for node in _before(result, {add: None, inputs[0]: None})):
        return "convolutions or linear layers stand after its last sum"
    return ResidualBlock(name, module, graph, terms)


def residual_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[ResidualBlock]:
    """Return the residual blocks of a model, taken apart, in the order of its modules; see the head of this file.

    Args:
        model: any module, fused or not.
        names: of the modules that are the blocks. None: the innermost modules that add a shortcut to a branch, and
            PlainBlock.

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
    for name, module in modules.items():
        if isinstance(module, _CONTAINERS) or not any(True for _ in module.children()):
            continue
        block = take_apart(name, module)
        if isinstance(block, str) and isinstance(module, StochasticDepth):
            raise ValueError(
                f"residual_blocks: {name} must not drop its branch, got rate {module.rate}; call model.eval()"
            )
        if isinstance(block, ResidualBlock) and (block.has_shortcut or isinstance(module, PlainBlock)):
            found[name] = block
    innermost = [
        block for name, block in found.items() if not any(_is_inside(other, name) for other in found if other != name)
    ]
    if not innermost:
        raise ValueError(
            f"residual_blocks: {type(model).__name__} must have modules that add a shortcut to a branch, got none "
            "that torch.fx can trace; give names, to see why a module is none"
        )
    return innermost


def _named(modules: Mapping[str, nn.Module], name: str) -> ResidualBlock:
    if name not in modules:
        raise ValueError(f"residual_blocks: names must be those of modules of the model, got {name!r}")
    block = take_apart(name, modules[name])
    if isinstance(block, str):
        kind = type(modules[name]).__name__
        raise ValueError(f"residual_blocks: {name or 'the model'} (a {kind}) must be a residual block: {block}")
    return block


def _is_inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def _dependent(of: fx.Node) -> set[fx.Node]:
    """Return a node and all nodes whose tensors are computed from it; sizes and dtypes are not meant."""
    found = {of}
    for node in of.graph.nodes:
        if node.target not in _SIZES.get(node.op, ()) and found & set(node.all_input_nodes):
            found.add(node)
    return found


def _before(wanted: fx.Node, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Return the nodes that a node is computed from and itself, in order, up to the known ones."""
    needed: set[fx.Node] = set()
    waiting = [wanted]
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in known:
            needed.add(node)
            waiting += node.all_input_nodes
    return [node for node in wanted.graph.nodes if node in needed]


def _is_add(node: fx.Node, dependent: set[fx.Node]) -> bool:
    """Whether a node adds two values, both computed from the input."""
    return (
        node.target in _ADDS.get(node.op, ())
        and not node.kwargs
        and len(node.args) == 2
        and all(isinstance(arg, fx.Node) and arg in dependent for arg in node.args)
    )


def _add_before(result: fx.Node, dependent: set[fx.Node]) -> fx.Node | None:
    """Return the sum from which the result is computed alone."""
    node = result
    while not _is_add(node, dependent):
        before = [other for other in node.all_input_nodes if other in dependent]
        if len(before) != 1:
            return None
        node = before[0]
    return node


def _terms(node: fx.Node, dependent: set[fx.Node]) -> list[fx.Node]:
    """Return the terms of a sum, or of a sum of sums."""
    if not _is_add(node, dependent):
        return [node]
    return list(chain(*(_terms(arg, dependent) for arg in node.args)))  # type: ignore[arg-type]


def _is_weighted(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), _WEIGHTED)
