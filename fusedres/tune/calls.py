"""Calls of ops with the arguments that a block gives them, and the tile sizes that they choose from.

A block runs under a dispatch mode. When it first calls an op with arguments of some shapes, this call is measured
immediately with these arguments; then the block continues. So tune always measures the package's own calls, even after
the ops or their arguments change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fusedres.kernels.triton_core import launch as launching
from fusedres.kernels.triton_core.launch import Config, Problem
from fusedres.ops._library import OPS, Op
from fusedres.tune.timing import Variant


@dataclass
class Call:
    """An op with its arguments at one place in a block."""

    op: Op
    args: tuple[Any, ...]  # the last one is the backend

    @property
    def signature(self) -> str:
        """The op's name, and the shapes and numbers among its arguments, as text."""
        words = [self.op.name]
        for argument, value in list(self.named().items())[:-1]:
            text = str(tree_map_only(Tensor, lambda t: "x".join(map(str, t.shape)) or "scalar", value))
            words.append(f"{argument}={text}".replace("'", ""))
        return " ".join(words)

    def named(self) -> dict[str, Any]:
        """Return the arguments by name."""
        return dict(zip(self.op.arguments, self.args, strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the narrowest floating-point tensor."""
        found = [t.dtype for t in tree_leaves(self.args) if isinstance(t, Tensor) and t.is_floating_point()]
        return min(found, key=lambda d: d.itemsize)

    def fresh(self) -> tuple[Any, ...]:
        """Return the arguments without the backend, with a copy of each that the op writes."""

        def own(argument: str, value: Any) -> Any:
            if argument not in self.op.written:
                return value
            return tree_map_only(Tensor, lambda t: t.clone(memory_format=torch.preserve_format), value)

        return tuple(own(name, value) for name, value in self.named().items())[:-1]

    def written(self, args: tuple[Any, ...]) -> list[Tensor]:
        """Return the arguments that the op writes."""
        named = dict(zip(self.op.arguments[:-1], args, strict=True))
        return [t for t in tree_leaves([named[name] for name in self.op.written]) if isinstance(t, Tensor)]

    def results(self, backend: str) -> list[Tensor]:
        """Return what a backend returns and writes, with partial results merged so that backends can be compared."""
        args = self.fresh()
        result = self.op.kernel(backend)(*self.op.grouped(args))
        found = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        return _merged(self.op.name, self._defined(found)) + self.written(args)

    def _defined(self, results: list[Tensor]) -> list[Tensor]:
        """Return the results without sums that the op may leave undefined (the last result of ops with with_sums)."""
        named = self.named()
        if "with_sums" not in named:
            return results
        *others, sums = results
        if not (named["with_sums"] or named["x_batch_statistics"] or named.get("shortcut_batch_statistics")):
            return others
        return [*others, sums if named.get("shortcut") is not None else sums[:2]]

    def variant(self, name: str, backend: str) -> Variant:
        """Return a variant to time, with its own copies of what the op writes; they are restored after each call."""
        args, kernel = self.fresh(), self.op.kernel(backend)
        parameters = self.op.grouped(args)
        pairs = list(zip(self.written(args), self.written(self.args[:-1]), strict=True))

        def restore() -> None:
            for target, source in pairs:
                target.copy_(source)

        return Variant(name, lambda: kernel(*parameters), restore if pairs else None)


def _merged(op: str, tensors: list[Tensor]) -> list[Tensor]:
    """Add up partial sums, and merge the means and squares of tiles, as backends split the rows differently."""
    if op == "conv_fprop" and tensors[1].numel():
        y, partials, rows = tensors
        weights, total = rows.view(-1, 1), rows.sum()
        mean = (weights * partials[:, 0]).sum(0) / total
        squares = (partials[:, 1] + weights * (partials[:, 0] - mean).square()).sum(0)
        return [y, mean, squares]
    if op in ("conv_dgrad", "one_pass_dgrad"):
        return [tensors[0], tensors[1].sum(0)]
    if op in ("bn_backward_reduce", "bn_relu_maxpool_reduce", "conv_wgrad", "bn_relu_maxpool_wgrad"):
        return [tensors[0].sum(0)]
    return tensors


class Visit(TorchDispatchMode):
    """Calls `measure` with every op's call when its signature is seen for the first time."""

    def __init__(self, seen: set[str], measure: Callable[[Call], None]) -> None:
        super().__init__()
        self._seen, self._measure = seen, measure

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "fusedres":
            call = Call(OPS[func._schema.name.partition("::")[2]], tuple(args))
            if call.signature not in self._seen:
                self._seen.add(call.signature)
                with torch.no_grad():
                    self._measure(call)
        return func(*args, **(kwargs or {}))


class Recorder:
    """A pick that chooses nothing and records the problems and their candidates."""

    def __init__(self) -> None:
        self.problems: dict[Problem, Sequence[Config]] = {}

    def __call__(self, problem: Problem, candidates: Sequence[Config]) -> None:
        self.problems.setdefault(problem, candidates)


def forced(problem: Problem, config: Config) -> launching.Pick:
    """Return a pick that chooses this config for this problem and nothing for others."""
    return lambda asked, candidates: config if asked == problem and config in candidates else None


def always(variant: Variant, pick: launching.Pick) -> Variant:
    """Return the variant with its configs chosen by `pick`."""

    def run() -> Any:
        with launching.choosing(pick):
            return variant.run()

    return Variant(variant.name, run, variant.cleanup)
