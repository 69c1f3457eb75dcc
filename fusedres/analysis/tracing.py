"""What blocks.py reads in the graph that torch.fx traces of a block: its sums, their terms, and their values."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

_ADDS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
_SIZES = ("shape", "dtype", "device", "ndim")
_SIZE_METHODS = ("size", "dim")
_WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)
_PRODUCTS = (
    "conv1d",
    "conv2d",
    "conv3d",
    "linear",
    "matmul",
    "bmm",
    "baddbmm",
    "einsum",
    "scaled_dot_product_attention",
)
# What keeps the elements as they are, and thus goes through a sum: u(a + b) = u(a) + u(b).
_KEEPING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten)
_KEEPING_METHODS = ("reshape", "view", "contiguous", "flatten", "unflatten", "clone")
_KEEPING_FUNCTIONS = (torch.flatten, torch.reshape)

_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class Term(NamedTuple):
    """A term of a sum: the value of a node, to which these nodes, that keep the elements as they are, are applied."""

    node: fx.Node
    kept_by: tuple[fx.Node, ...] = ()


class Traced:
    """The graph of a block, which runs the submodules of the block itself."""

    def __init__(self, module: nn.Module, copied: nn.Module, graph: fx.Graph) -> None:
        targets = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
        # The tracer keeps the constants of a forward in the copy.
        parts = {target: _at(module, target, _at(copied, target, None)) for target in targets}
        self._module, self._graph = module, fx.GraphModule(parts, graph)
        # The first placeholder is the input; the others are arguments that have their defaults.
        self.input, *others = (node for node in graph.nodes if node.op == "placeholder")
        self._given = {node: node.args[0] if node.args else None for node in others}
        self.result: Any = graph.output_node().args[0]
        self.dependent = _dependent(self.input)

    def value(self, wanted: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        """Return the value of a node, from the values of others."""
        interpreter = fx.Interpreter(self._graph, garbage_collect_values=False)
        interpreter.env = {**self._given, **known}
        for node in needed_for(wanted, interpreter.env):
            interpreter.env[node] = interpreter.run_node(node)
        return interpreter.env[wanted]

    def of_term(self, term: Term, x: Tensor) -> Tensor:
        """Return the value of a term for an input of the block, which no step overwrites."""
        found = self.value(term.node, {self.input: x.clone()})
        for node in term.kept_by:
            found = self.value(node, {self.before(node)[0]: found, self.input: x})
        return found

    def before(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that a node reads and that are computed from the block's input."""
        return [other for other in node.all_input_nodes if other in self.dependent]

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls, if it calls one."""
        return self._module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def is_weighted(self, node: fx.Node) -> bool:
        """Whether a node is a convolution or a matrix product."""
        module = self.module_of(node)
        if module is not None:
            return any(isinstance(each, _WEIGHTED) for each in module.modules())
        return node in self.dependent and getattr(node.target, "__name__", node.target) in _PRODUCTS

    def has_parameters(self, node: fx.Node) -> bool:
        """Whether a node reads parameters."""
        module = self.module_of(node)
        return node.op == "get_attr" if module is None else any(True for _ in module.parameters())

    def keeps(self, node: fx.Node) -> bool:
        """Whether a node returns the elements of one tensor as they are, in another shape perhaps."""
        module = self.module_of(node)
        if module is not None:
            dropping = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
            return isinstance(module, _KEEPING_MODULES) or dropping
        keeping = {"call_method": _KEEPING_METHODS, "call_function": _KEEPING_FUNCTIONS}.get(node.op, ())
        return node.target in keeping and len(self.before(node)) == 1

    def is_below(self, node: fx.Node, path: str) -> bool:
        """Whether a node was traced in the module at a path below the block, or calls it."""
        places = self._places(node)
        return any(place == path or place.startswith(f"{path}.") for place in places)

    def is_in_weighted_part(self, node: fx.Node) -> bool:
        """Whether a node was traced in a submodule that has convolutions or linear layers."""
        modules = [self._module.get_submodule(place) for place in self._places(node) if place]
        return any(isinstance(each, _WEIGHTED) for module in modules for each in module.modules())

    def _places(self, node: fx.Node) -> list[str]:
        """Return the paths of the submodules in which a node was traced, and of the one that it calls."""
        return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def trace(module: nn.Module) -> Traced | str:
    """Return the graph of a module with one tensor to one tensor, or why there is none, in words.

    A copy is traced, with the same parameters, so that what a forward changes, or draws, is nowhere seen. Arguments
    with defaults have their defaults.
    """
    try:
        copied = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
        for each in copied.modules():
            each._forward_hooks.clear()
        signature = inspect.signature(copied.forward).parameters.values()
        defaults = {each.name: each.default for each in signature if each.default is not inspect.Parameter.empty}
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            graph = fx.Tracer().trace(copied, concrete_args=defaults or None)
    except Exception as error:  # a forward may do anything with what torch.fx gives it
        return f"torch.fx cannot trace its forward: {' '.join(str(error).split())[:120]}"
    required = [each for each in signature if each.default is inspect.Parameter.empty and each.kind not in _REST]
    if len(required) != 1 or not isinstance(graph.output_node().args[0], fx.Node):
        return "its forward does not turn one tensor into one tensor"
    return Traced(module, copied, graph)


def _at(module: nn.Module, path: str, otherwise: Any) -> Any:
    """Return what is at a path below a module, or something else."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return otherwise if found is None else found


def needed_for(wanted: fx.Node, known: Mapping[Any, Any]) -> list[fx.Node]:
    """Return the nodes that a node is computed from and itself, in order, up to the known ones."""
    needed: set[fx.Node] = set()
    waiting = [wanted]
    while waiting:
        node = waiting.pop()
        if node not in needed and node not in known:
            needed.add(node)
            waiting += node.all_input_nodes
    return [node for node in wanted.graph.nodes if node in needed]


def add_before(traced: Traced) -> fx.Node | None:
    """Return the sum from which a block's result is computed alone."""
    node = traced.result
    while not _is_add(node, traced):
        before = traced.before(node)
        if len(before) != 1:
            return None
        node = before[0]
    return node


def terms_of(traced: Traced, term: Term) -> list[Term]:
    """Return the terms of a sum, or of a sum of sums."""
    node, kept_by = term.node, term.kept_by
    while traced.keeps(node):
        kept_by = (node, *kept_by)
        node = traced.before(node)[0]
    if not _is_add(node, traced):
        return [Term(node, kept_by)]
    return list(chain(*(terms_of(traced, Term(arg, kept_by)) for arg in node.args)))  # type: ignore[arg-type]


def _is_add(node: fx.Node, traced: Traced) -> bool:
    """Whether a node adds two values, both computed from the input."""
    return (
        node.target in _ADDS.get(node.op, ())
        and not node.kwargs
        and len(node.args) == 2
        and all(isinstance(arg, fx.Node) and arg in traced.dependent for arg in node.args)
    )


def _dependent(of: fx.Node) -> set[fx.Node]:
    """Return a node and all nodes whose elements are computed from it; sizes and dtypes are not meant."""
    found = {of}
    for node in of.graph.nodes:
        is_size = (node.target is getattr and node.args[1] in _SIZES) or (
            node.op == "call_method" and node.target in _SIZE_METHODS
        )
        if not is_size and found & set(node.all_input_nodes):
            found.add(node)
    return found
