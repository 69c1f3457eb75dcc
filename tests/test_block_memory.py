"""A block never reads freed memory or memory of another dtype or shape: it raises an error of a clear class instead."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from fusion import stock_case
from reference import run
from shapes import CORE, Case, case
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres

BOTTLENECK = case("bottleneck", "projection", planes=4, batch=8)
Change = Callable[[Tensor], Tensor]


def free(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def shrink(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - tensor.element_size())


def own(owner: nn.Module, name: str) -> Tensor:
    """Replace a tensor of a module by a copy with a storage of its own, and return it."""
    old = getattr(owner, name)
    new = old.detach().clone()
    if isinstance(old, nn.Parameter):
        setattr(owner, name, nn.Parameter(new))
        return getattr(owner, name).data
    setattr(owner, name, new)
    return new


TENSORS = (
    "conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn2.running_var", "bn2.num_batches_tracked",
    "downsample.0.weight", "downsample.1.bias",
)  # fmt: skip


@pytest.mark.parametrize("take", [free, shrink])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", TENSORS)
def test_memory_that_was_freed(name: str, mode: str, backend: str, take: Callable[[Tensor], None]) -> None:
    block, x, _ = stock_case(case("basic", "projection"), mode=mode)
    twin = fusedres.fuse(block)
    if "num_batches" in name and mode == "eval":
        pytest.skip("not read in eval mode")
    owner, _, leaf = name.rpartition(".")
    take(own(twin.get_submodule(owner), leaf))
    others = {key: buffer.clone() for key, buffer in twin.named_buffers() if key != name}
    for recorded in (True, False):
        expected = pytest.raises(RuntimeError, match=r"must have memory for its shape .*, got a storage of")
        with fusedres.use_backend(backend), torch.set_grad_enabled(recorded), expected:
            twin(x)
    assert all(torch.equal(dict(twin.named_buffers())[key], value) for key, value in others.items())


@pytest.mark.parametrize("take", [free, shrink])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_an_input_that_was_freed(
    memory_format: torch.memory_format, backend: str, take: Callable[[Tensor], None]
) -> None:
    for block_case in CORE:
        block, x, _ = stock_case(block_case, memory_format=memory_format)
        twin = fusedres.fuse(block)
        x = x.clone(memory_format=torch.preserve_format)
        take(x)
        with fusedres.use_backend(backend), pytest.raises(RuntimeError):
            twin(x)


@pytest.mark.parametrize("what", ["conv1.weight", "bn1.running_var", "x"])
def test_a_stem_whose_memory_was_freed(what: str) -> None:
    model = fusedres.fuse(ResNet(BasicBlock, [1, 1, 1, 1]))
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    owner, _, leaf = what.rpartition(".")
    free(x if what == "x" else own(model.get_submodule(owner), leaf))
    with pytest.raises(RuntimeError, match="must have memory"):
        model(x)


# --- tensors that saved-tensor hooks return


def other_dtype(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32 if tensor.dtype is torch.float64 else torch.float64)


def fewer_rows(tensor: Tensor) -> Tensor:
    return tensor[:-1].clone() if tensor.dim() else tensor


def one_dimension_more(tensor: Tensor) -> Tensor:
    return tensor[None].clone()


def freed(tensor: Tensor) -> Tensor:
    found = tensor.clone()
    free(found)
    return found


def shrunk(tensor: Tensor) -> Tensor:
    found = tensor.clone()
    shrink(found)
    return found


def strided(tensor: Tensor) -> Tensor:
    """Return the same values with a stride of two elements."""
    return torch.stack([tensor, tensor], -1)[..., 0]


CHANGES: dict[str, Change] = {
    "other dtype": other_dtype,
    "fewer rows": fewer_rows,
    "one dimension more": one_dimension_more,
    "freed": freed,
    "shrunk": shrunk,
}


def saved_count(block: nn.Module, x: Tensor) -> int:
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(x)
    return len(kept)


def gradients(block: nn.Module, x: Tensor, grad: Tensor, changed: int | None, change: Change) -> list[Tensor | None]:
    """Return the gradients when a hook changes the saved tensor of this number, or all saved tensors if it is None."""
    counter = iter(range(1000))
    leaf = x.detach().clone().requires_grad_()
    block.zero_grad(set_to_none=True)
    with saved_tensors_hooks(
        lambda tensor: (next(counter), tensor.detach().clone(memory_format=torch.preserve_format)),
        lambda packed: change(packed[1]) if changed in (None, packed[0]) else packed[1],
    ):
        out = block(leaf)
    out.backward(grad)
    return [leaf.grad, *(p.grad for p in block.parameters())]


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize(
    ("memory", "conv", "backend"),
    [
        ("auto", "library", "cpu"),
        ("min", "library", "cpu"),
        ("auto", "fused", "reference"),
        ("min", "fused", "reference"),
    ],
)
def test_saved_tensors_of_another_kind(memory: str, conv: str, backend: str, what: str) -> None:
    """A change of one saved tensor is an error, or keeps the gradients if it keeps the values (a weight in float64)."""
    block, x, grad = stock_case(BOTTLENECK, memory_format=torch.channels_last)
    twin = fusedres.fuse(block, memory=memory, conv=conv)
    with fusedres.use_backend(backend):
        expected = gradients(copy.deepcopy(twin), x, grad, -1, CHANGES[what])
        refused = 0
        for number in range(saved_count(copy.deepcopy(twin), x.requires_grad_())):
            try:
                got = gradients(copy.deepcopy(twin), x, grad, number, CHANGES[what])
            except RuntimeError:
                refused += 1
                continue
            assert what == "other dtype", f"{what}, saved tensor {number}"
            for value, right in zip(got, expected, strict=True):
                assert value is not None and right is not None
                torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-4)
    assert refused >= 6


@pytest.mark.parametrize("what", CHANGES)
def test_saved_tensors_of_a_stem(what: str) -> None:
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    for name in ("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
        setattr(model, name, nn.Identity())
    fusedres.fuse(model)
    x = torch.randn(2, 3, 21, 22).to(memory_format=torch.channels_last)
    grad = torch.randn(model(x).shape)
    for number in range(1, 7):  # without the images, which need no gradient
        try:
            gradients(copy.deepcopy(model), x, grad, number, CHANGES[what])
        except RuntimeError:
            continue
        assert what == "other dtype" or number > 6, number


@pytest.mark.parametrize("memory", ["auto", "min"])
@pytest.mark.parametrize("block_case", [*CORE, BOTTLENECK], ids=str)
def test_saved_tensors_in_another_layout(block_case: Case, memory: str) -> None:
    block, x, grad = stock_case(block_case)
    twin = fusedres.fuse(block, memory=memory)
    expected = run(copy.deepcopy(twin), x, grad)
    got = gradients(copy.deepcopy(twin), x, grad, None, strided)
    named = ["grad_x", *(f"grad.{name}" for name, _ in twin.named_parameters())]
    for name, value in zip(named, got, strict=True):
        assert value is not None
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("memory", ["auto", "min"])
def test_saved_tensors_that_are_lazily_negated(memory: str) -> None:
    block, x, grad = stock_case(BOTTLENECK, memory_format=torch.channels_last)
    twin = fusedres.fuse(block, memory=memory)
    expected = gradients(copy.deepcopy(twin), x, grad, -1, strided)
    got = gradients(copy.deepcopy(twin), x, grad, None, lambda t: torch._neg_view(-t) if t.is_floating_point() else t)
    for value, right in zip(got, expected, strict=True):
        assert value is not None and right is not None
        torch.testing.assert_close(value, right, rtol=1e-4, atol=1e-5 * right.abs().max().item())


def test_selective_checkpoints_keep_what_the_tail_would_overwrite() -> None:
    def policy(_: object, op: object, *args: object, **options: object) -> CheckpointPolicy:
        convolution = op is torch.ops.aten.convolution.default
        return CheckpointPolicy.MUST_SAVE if convolution else CheckpointPolicy.PREFER_RECOMPUTE

    block, x, grad = stock_case(BOTTLENECK, torch.float64, torch.channels_last)
    grads = []
    for memory in ("auto", "min"):
        twin = fusedres.fuse(copy.deepcopy(block), memory=memory)
        contexts = partial(create_selective_checkpoint_contexts, policy)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        checkpoint(twin, leaf, use_reentrant=False, context_fn=contexts).backward(grad)
        grads.append([leaf.grad, *(p.grad for p in twin.parameters())])
    for got, value in zip(*grads, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-9)


def test_torchs_default_device_is_not_the_blocks() -> None:
    for memory in ("auto", "min"):
        model = fusedres.fuse(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3), memory=memory)
        x = torch.randn(16, 3, 32, 32)
        expected = model.eval()(x)
        try:
            torch.set_default_device("meta")
            assert torch.equal(model(x), expected)
            model.train()(x.requires_grad_()).sum().backward()
            with torch.no_grad():
                torch.testing.assert_close(fusedres.freeze(model.eval())(x), model(x))
        finally:
            torch.set_default_device(None)
        assert all(p.grad is not None and p.grad.is_cpu for p in model.parameters())
