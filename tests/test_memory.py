"""Bytes kept for backward, as saved_tensors_hooks counts them; and that nothing else is kept.

Each storage counts once; the block's input and parameters do not count. 64 channels, 28x28, batch 16, float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
from fusion import FORMATS, MEMORY, fused_twin, label
from reference import build
from shapes import Case
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIZE = {"batch": 16, "height": 28, "width": 28}
BASIC = Case("basic", "identity", 64, 64, **SIZE)
BOTTLENECK = Case("bottleneck", "identity", 256, 64, **SIZE)
PROJECTED = (
    Case("basic", "projection", 64, 64, **SIZE),
    Case("basic", "projection", 32, 64, 2, 16, 56, 56),
    Case("bottleneck", "projection", 64, 64, **SIZE),
    Case("bottleneck", "projection", 128, 64, 2, 16, 56, 56),
)
# The largest allowed share of eager's bytes for each case and memory mode.
LIMITS = (
    (BASIC, "auto", 0.76),
    (BASIC, "min", 0.76),
    (BOTTLENECK, "auto", 0.84),
    (BOTTLENECK, "min", 0.55),
    *((case, "min", 0.76 if case.block == "basic" else 0.84) for case in PROJECTED),
    (Case("basic", "zeropad", 32, 64, 2, 16, 56, 56), "auto", 0.76),
    (Case("bottleneck", "zeropad", 128, 64, 2, 16, 56, 56), "auto", 0.84),
)


class Storages(TorchDispatchMode):
    """Records every storage that an operator returns while the mode is on, with its size.

    `alive` does not collect garbage first: activations in a reference cycle count as alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                self.seen[reference.cdata] = reference, storage.nbytes()
        return out

    def alive(self) -> dict[int, int]:
        return {key: size for key, (reference, size) in self.seen.items() if not reference.expired()}


def key_of(tensor: Tensor) -> int:
    return StorageWeakRef(tensor.untyped_storage()).cdata


def saved_storages(block: nn.Module, x: Tensor) -> tuple[Tensor, dict[int, int]]:
    """Return the output of a forward, and the saved storages by key, without those of x, parameters and buffers."""
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[key_of(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(x)
    for tensor in (x, *block.parameters(), *block.buffers()):
        saved.pop(key_of(tensor), None)
    return out, saved


def saved_bytes(block: nn.Module, x: Tensor) -> int:
    return sum(saved_storages(block, x)[1].values())


def example(case: Case, memory_format: torch.memory_format = torch.channels_last) -> tuple[nn.Module, Tensor]:
    x = torch.randn(case.batch, case.in_channels, case.height, case.width).to(memory_format=memory_format)
    return build(case, memory_format=memory_format), x.requires_grad_()


@pytest.mark.parametrize(("case", "memory", "limit"), LIMITS, ids=label)
def test_saved_bytes_against_eager(case: Case, memory: str, limit: float) -> None:
    block, x = example(case)
    share = saved_bytes(fused_twin(block, memory), x) / saved_bytes(block, x)
    assert share <= limit, f"{share:.4f} of eager's bytes are saved, {limit} are allowed"


def test_the_count_of_the_stock_blocks_is_the_known_one() -> None:
    """Eager saves y1, z1, y2 and out of a BasicBlock; of a Bottleneck y1, z1, y2, z2 (a quarter each), y3 and out."""
    unit = 16 * 64 * 28 * 28 * 4
    for case, units in ((BASIC, 4), (BOTTLENECK, 12)):
        block, x = example(case)
        assert saved_bytes(block, x) == pytest.approx(units * unit, rel=1e-3)


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", [BASIC, BOTTLENECK, *PROJECTED], ids=label)
def test_nothing_lives_between_forward_and_backward_but_what_is_saved(
    case: Case, memory: str, memory_format: torch.memory_format
) -> None:
    """After forward only the output and the saved storages are alive: the context hides no other storage."""
    case = Case(**{**vars(case), "batch": 2})
    block, x = example(case, memory_format)
    twin = fused_twin(block, memory)
    with Storages() as storages:
        out, saved = saved_storages(twin, x)
    given = {key_of(tensor) for tensor in (x, *twin.parameters(), *twin.buffers())}
    hidden = {key: size for key, size in storages.alive().items() if key not in saved.keys() | given | {key_of(out)}}
    assert not hidden, f"alive and not saved: {sorted(hidden.values())} bytes"
    assert saved.keys() - storages.alive().keys() <= {key_of(out)}
    out.sum().backward()
    del out, saved
    left = storages.alive()
    grads = {key_of(p.grad) for p in (x, *twin.parameters())}
    assert left.keys() <= grads | given, "storages outlive the backward"


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("case", [BASIC, BOTTLENECK, PROJECTED[0]], ids=label)
def test_a_dropped_graph_frees_everything(case: Case, memory: str) -> None:
    block, x = example(Case(**{**vars(case), "batch": 2}))
    twin = fused_twin(block, memory)
    with Storages() as storages:
        out = twin(x)
    del out
    assert not storages.alive()


@pytest.mark.parametrize("case", [BASIC, BOTTLENECK], ids=label)
def test_nothing_is_saved_where_no_gradient_is_wanted(case: Case) -> None:
    block, x = example(Case(**{**vars(case), "batch": 2}))
    for mode in (True, False):
        twin = fused_twin(copy.deepcopy(block).train(mode))
        with torch.no_grad(), Storages() as storages:
            out, saved = saved_storages(twin, x)
        assert not saved
        given = {key_of(tensor) for tensor in (x, *twin.parameters(), *twin.buffers())}
        assert storages.alive().keys() - given == {key_of(out)}
