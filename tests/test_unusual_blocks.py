"""Unusual blocks run unfused, with the stock block's numbers, and report() says why."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from fusion import expect_paths, fused_twin, stock_case
from reference import build, inputs, randomize, run
from shapes import case
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models import resnext50_32x4d
from torchvision.models.resnet import BasicBlock, Bottleneck

import fusedres

SMALL = case("basic", "projection")


class Halved(nn.BatchNorm2d):
    """A BatchNorm subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Quantized(nn.Conv2d):
    """A convolution that rounds its weight at each call, as in quantization-aware training."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = torch.fake_quantize_per_tensor_affine(self.weight, 0.05, 0, -128, 127)
        return self._conv_forward(x, rounded, None)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Marked(Tensor):
    """A tensor subclass."""


def replaced(block: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, child)


def with_bias(block: nn.Module) -> None:
    block.conv1.bias = nn.Parameter(torch.linspace(-1, 1, block.conv1.out_channels))


def with_padding_mode(block: nn.Module) -> None:
    block.conv1.padding_mode = "circular"
    block.conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def with_tensor_subclass(block: nn.Module) -> None:
    block.conv2.weight = nn.Parameter(block.conv2.weight.detach().as_subclass(Marked))


def with_quantized_conv(block: nn.Module) -> None:
    quantized = Quantized(block.conv2.in_channels, block.conv2.out_channels, 3, padding=1, bias=False)
    quantized.weight = block.conv2.weight
    block.conv2 = quantized


def with_pooling(block: nn.Module) -> None:
    block.downsample[0].stride = (1, 1)
    block.downsample.insert(0, nn.MaxPool2d(2, ceil_mode=True))


def with_strided(block: nn.Module, name: str) -> None:
    """Replace a vector of a BatchNorm by every second element of a longer one."""
    old = getattr(block.bn2, name)
    longer = torch.stack([old.detach(), torch.full_like(old, 7)], dim=1)[:, 0]
    setattr(block.bn2, name, nn.Parameter(longer) if isinstance(old, nn.Parameter) else longer)


def with_instance_forward(block: nn.Module) -> None:
    bn1 = block.bn1
    bn1.forward = lambda x: nn.BatchNorm2d.forward(bn1, x) + 1


# Changes that make a block unusual, and words that the reason must contain.
UNUSUAL: dict[str, tuple[Callable[[nn.Module], object], tuple[str, ...]]] = {
    "forward hook on bn1": (lambda b: b.bn1.register_forward_hook(lambda _, __, out: out * 2), ("hook", "bn1")),
    "pre-hook on conv2": (lambda b: b.conv2.register_forward_pre_hook(lambda _, a: (a[0] + 1,)), ("hook", "conv2")),
    "hook on relu": (lambda b: b.relu.register_forward_hook(lambda _, __, out: out + 1), ("hook", "relu")),
    "hook on downsample": (
        lambda b: b.downsample.register_forward_hook(lambda _, __, o: o - 1),
        ("hook", "downsample"),
    ),
    "hook on downsample.1": (
        lambda b: b.downsample[1].register_forward_hook(lambda _, __, o: o - 1),
        ("hook", "downsample.1"),
    ),
    "backward hook on conv1": (
        lambda b: b.conv1.register_full_backward_hook(lambda _, gi, __: (gi[0] * 3,)),
        ("hook", "conv1"),
    ),
    "custom norm": (lambda b: replaced(b, "bn2", Halved(b.bn2.num_features)), ("bn2", "Halved")),
    "group norm": (lambda b: replaced(b, "bn1", nn.GroupNorm(2, b.bn1.num_features)), ("bn1", "GroupNorm")),
    "identity for a norm": (lambda b: replaced(b, "bn1", nn.Identity()), ("bn1", "Identity")),
    "other activation": (lambda b: replaced(b, "relu", nn.LeakyReLU(0.1)), ("relu", "LeakyReLU")),
    "conv bias": (with_bias, ("conv1", "bias")),
    "padding mode": (with_padding_mode, ("conv1", "padding_mode", "circular")),
    "parametrized weight": (
        lambda b: parametrize.register_parametrization(b.conv1, "weight", Doubled()),
        ("parametriz", "conv1"),
    ),
    "parametrized norm": (
        lambda b: parametrize.register_parametrization(b.bn1, "weight", Doubled()),
        ("parametriz", "bn1"),
    ),
    "pruned weight": (lambda b: prune.random_unstructured(b.conv2, "weight", 0.5), ("conv2",)),
    "tensor subclass": (with_tensor_subclass, ("conv2", "Marked")),
    "strided weight of a norm": (lambda b: with_strided(b, "weight"), ("bn2", "contiguous")),
    "strided running mean": (lambda b: with_strided(b, "running_mean"), ("bn2", "contiguous")),
    "instance forward on a child": (with_instance_forward, ("bn1", "forward")),
    "quantized conv": (with_quantized_conv, ("conv2", "Quantized")),
    "longer downsample": (lambda b: b.downsample.append(nn.Dropout(0.0)), ("downsample",)),
    "pooling in downsample": (with_pooling, ("downsample",)),
}


@pytest.mark.parametrize("after", [False, True], ids=["before fuse", "after fuse"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_block_runs_unfused_with_identical_numbers(what: str, mode: str, after: bool) -> None:
    """report() gives the reason, and all numbers equal the stock block's bit by bit; every call checks again."""
    alter, words = UNUSUAL[what]
    (block, x, grad), (twin, _, _) = (stock_case(SMALL, mode=mode) for _ in range(2))
    if after:
        fusedres.fuse(twin)
        assert fusedres.report(twin)[0].fused
    for model in (block, twin):
        torch.manual_seed(0)
        alter(model)
    fusedres.fuse(twin)
    (row,) = fusedres.report(twin)
    assert not row.fused
    assert all(word.lower() in row.reason.lower() for word in words), row.reason
    eager = run(block, x, grad)
    with expect_paths(unfused=1):
        got = run(twin, x, grad)
    assert got.keys() == eager.keys()
    for name, value in eager.items():
        assert torch.equal(got[name], value), name


def test_a_block_runs_fused_again_once_the_hook_is_gone() -> None:
    block, x, grad = stock_case(SMALL)
    twin = fused_twin(block)
    with expect_paths(fused_forward=1, fused_backward=1):
        run(twin, x, grad)
    seen: list[Tensor] = []
    handle = twin.bn1.register_forward_hook(lambda _, __, out: seen.append(out))
    with expect_paths(unfused=1):
        run(twin, x, grad)
    assert len(seen) == 1
    handle.remove()
    with expect_paths(fused_forward=1, fused_backward=1):
        run(twin, x, grad)
    assert fusedres.report(twin)[0].fused


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ],
)
def test_global_module_hooks_are_seen(register: Callable[..., object]) -> None:
    block, x, grad = stock_case(SMALL)
    twin = fused_twin(block)
    fired: list[str] = []
    handle = register(lambda module, *_: fired.append(type(module).__name__))
    try:
        assert "global" in fusedres.report(twin)[0].reason
        with expect_paths(unfused=1):
            run(twin, x, grad)
    finally:
        handle.remove()  # type: ignore[attr-defined]
    assert fired.count("BatchNorm2d") == 3
    with expect_paths(fused_forward=1, fused_backward=1):
        run(twin, x, grad)


def test_a_subclass_and_an_instance_forward_are_reported_and_left_alone() -> None:
    class Mine(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    mine, patched = Mine(4, 4), BasicBlock(4, 4)
    patched.forward = lambda x: x * 2
    model = nn.Sequential(mine, patched)
    fusedres.fuse(model)
    assert type(mine) is Mine
    rows = fusedres.report(model)
    assert [row.fused for row in rows] == [False, False]
    assert "Mine" in rows[0].reason
    assert "forward" in rows[1].reason
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(patched(x), x * 2)


def test_a_forward_put_on_a_fused_block_is_what_runs_and_is_reported() -> None:
    block = fusedres.fuse(build(case("basic", "identity")))
    block.forward = lambda x: x * 3
    x = torch.randn(2, 8, 3, 3)
    assert torch.equal(block(x), x * 3)
    assert not fusedres.report(block)[0].fused


def test_a_block_that_was_not_fused_is_reported_so() -> None:
    (row,) = fusedres.report(build(SMALL))
    assert (row.name, row.kind, row.fused) == ("(model)", "BasicBlock", False)
    assert "fuse()" in row.reason


def test_convert_sync_batchnorm_after_fuse() -> None:
    """Without a process group, SyncBatchNorm is BatchNorm."""
    block, x, _ = stock_case(SMALL, mode="eval")
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block))
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert fusedres.report(twin)[0].fused
    with expect_paths(fused_forward=1):
        torch.testing.assert_close(twin(x), stock(x))


def test_grouped_convolutions_match_resnext() -> None:
    """ResNeXt's blocks are fused, or reported with a reason; in both cases they compute what torchvision's do."""
    with torch.device("meta"):
        assert len(fusedres.report(fusedres.fuse(resnext50_32x4d()))) == 17
    stock = randomize(Bottleneck(32, 8, groups=4, base_width=64), 1).double()
    twin = fusedres.fuse(copy.deepcopy(stock))
    x, grad = (torch.randn(3, 32, 5, 4, dtype=torch.float64) for _ in range(2))
    eager, got = run(stock, x, grad), run(twin, x, grad)
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("dilation", [2, 3])
def test_dilated_bottlenecks_match(dilation: int) -> None:
    stock = randomize(Bottleneck(32, 8, dilation=dilation), 2).double()
    twin = fusedres.fuse(copy.deepcopy(stock))
    x, grad = (torch.randn(3, 32, 7, 6, dtype=torch.float64) for _ in range(2))
    eager, got = run(stock, x, grad), run(twin, x, grad)
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_functional_call_uses_the_given_parameters() -> None:
    """torch.func uses other parameters for one call and gives their gradients; the module's own ones do not change."""
    block, x, _ = stock_case(SMALL, torch.float64, mode="eval")
    twin = fused_twin(block)
    others = {name: p.detach() * 1.5 for name, p in block.named_parameters()}

    def loss(model: nn.Module, parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    eager, got = (torch.func.grad(lambda p, m=m: loss(m, p))(others) for m in (block, twin))
    torch.testing.assert_close(loss(twin, others), loss(block, others), rtol=1e-10, atol=0)
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=name)
    torch.testing.assert_close(twin(x), block(x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_forward_mode_and_batched_transforms_match() -> None:
    """jvp and vmap of a fused block in eval mode equal those of the stock block."""
    block, x, tangent = stock_case(case("basic", "identity"), torch.float64, mode="eval")
    twin = fused_twin(block)
    for eager, got in zip(torch.func.jvp(block, (x,), (tangent,)), torch.func.jvp(twin, (x,), (tangent,)), strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-10, atol=1e-10)
    many = torch.stack([x, tangent, x - tangent])
    torch.testing.assert_close(torch.func.vmap(twin)(many), torch.func.vmap(block)(many), rtol=1e-10, atol=1e-10)


def test_a_tensor_subclass_as_input_runs_unfused() -> None:
    block, x, _ = stock_case(SMALL, mode="eval")
    with expect_paths(unfused=1):
        out = fused_twin(block)(x.as_subclass(Marked))
    assert torch.equal(out, block(x.as_subclass(Marked)))
    assert type(out) is Marked


def test_apply_and_to_reach_the_parts_of_a_fused_model() -> None:
    """After fuse(), .to, .half, .apply and .requires_grad_ work as on the stock model."""
    block, _, _ = stock_case(SMALL)
    twin = fused_twin(block)
    twin.to(torch.float64, memory_format=torch.channels_last).requires_grad_(False)
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in twin.parameters())
    x, grad = inputs(SMALL, torch.float64)
    block.double().requires_grad_(False)
    eager, got = run(block, x, grad), run(twin, x, grad)
    assert got.keys() == eager.keys()
    torch.testing.assert_close(got["grad_x"], eager["grad_x"], rtol=1e-10, atol=1e-10)
