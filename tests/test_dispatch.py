"""A fused block runs only convolutions, fused ops, matrix products, views and allocations; no pointwise operators.

Every operator that reads or writes an activation must be on the list. On tensors of a parameter's size (weights that
are cast or folded, statistics) other operators cost little; but native_batch_norm, relu and threshold_backward never
run.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from fusion import MEMORY, fused_twin, label, stock_case
from shapes import CORE, Case, with_size
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedres

CONVOLUTIONS = {
    "convolution",
    "convolution_backward",
    "_convolution_pointwise",
    "_convolution_pointwise_",
    "mkldnn_convolution",
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
VIEWS = {
    *("view", "as_strided", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "expand"),
    *("detach", "alias", "_unsafe_view", "_reshape_alias", "narrow"),
}
ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "zeros",
    "zeros_like",
    "new_zeros",
}
ALLOWED = CONVOLUTIONS | PRODUCTS | VIEWS | ALLOCATIONS
NEVER = ("batch_norm", "relu", "threshold", "clamp")


class Listing(TorchDispatchMode):
    """Collects the operators that ran, and those that touched a tensor of at least `large` elements."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.ran: Counter[str] = Counter()
        self.on_activations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = f"{func.namespace}::{func._schema.name.split('::')[1]}"
        self.ran[name] += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        if any(tensor.numel() >= self.large for tensor in tensors):
            self.on_activations[name] += 1
        return out


def activation_size(case: Case) -> int:
    """Return the number of elements of the smallest activation; in these cases every parameter is smaller."""
    return case.values_a_channel * case.planes


def wide(case: Case) -> Case:
    """Return the case with images so large that every activation has more elements than any parameter."""
    return with_size(case, 4, 40, 40)


def list_ops(case: Case, mode: str, memory: str, want_grad: bool) -> Listing:
    block, x, grad = stock_case(wide(case), memory_format=torch.channels_last, mode=mode)
    twin = fused_twin(block, memory)
    large = activation_size(wide(case))
    assert all(p.numel() < large for p in twin.parameters())
    x.requires_grad_(want_grad)
    with torch.set_grad_enabled(want_grad), Listing(large) as listing:
        out = twin(x)
        if want_grad:
            out.backward(grad)
    return listing


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("want_grad", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_a_fused_block_executes_only_fused_ops(case: Case, mode: str, want_grad: bool, memory: str) -> None:
    listing = list_ops(case, mode, memory, want_grad)
    foreign = {
        name: count
        for name, count in listing.on_activations.items()
        if not name.startswith("fusedres::") and name.split("::")[1] not in ALLOWED
    }
    assert not foreign, f"on activations ran {foreign}"
    never = {
        name: count
        for name, count in listing.ran.items()
        for word in NEVER
        if word in name.split("::")[1] and "fusedres" not in name
    }
    assert not never, f"these ran: {never}"
    assert any(name.startswith("fusedres::") for name in listing.ran)


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_convolutions_run_once_each_way(case: Case, mode: str, memory: str) -> None:
    """Each convolution runs once forward and once backward; none is repeated."""
    listing = list_ops(case, mode, memory, want_grad=True)
    forward = sum(
        listing.ran[f"{space}::{name}"]
        for space in ("aten", "mkldnn")
        for name in CONVOLUTIONS - {"convolution_backward"}
    )
    products = sum(count for name, count in listing.on_activations.items() if name.split("::")[1] in PRODUCTS)
    count = len(case.convolutions)
    assert forward <= count
    assert forward + products >= count
    assert listing.ran["aten::convolution_backward"] <= count


def test_the_listing_sees_what_the_stock_block_runs() -> None:
    case = wide(CORE[0])
    block, x, grad = stock_case(case, memory_format=torch.channels_last)
    with Listing(activation_size(case)) as listing:
        block(x.requires_grad_()).backward(grad)
    ran = listing.on_activations
    assert any("batch_norm" in name for name in ran)
    assert ran["aten::relu_"] == 2
    assert ran["aten::threshold_backward"] == 2
    assert ran["aten::add_"] == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", CORE, ids=label)
def test_ops_name_the_selected_backend(case: Case, memory: str, backend: str) -> None:
    named: set[str] = set()

    class Backends(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if func.namespace == "fusedres" and func._schema.arguments[-1].name == "backend":
                named.add(args[-1] if len(args) == len(func._schema.arguments) else (kwargs or {})["backend"])
            return func(*args, **(kwargs or {}))

    block, x, grad = stock_case(case, memory_format=torch.channels_last)
    twin = fused_twin(block, memory)
    with fusedres.use_backend(backend), Backends():
        twin(x.requires_grad_()).backward(grad)
    assert named == {backend}
