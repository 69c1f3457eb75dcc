"""Blocks of any class are taken apart into branch and shortcut, and the parts of the gradient add up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import fusedres
from fusedres import models
from fusedres.analysis import gradient_flow, residual_blocks, unrolling
from fusedres.analysis.gradient_flow import PLAIN_GROWTH
from fusedres.analysis.observing import observe
from fusedres.analysis.unrolling import SKIPS, sigmoid_chain


def branch() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))


class Designs(nn.Module):
    """One block of each design of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(
            fusedres.ReZero(branch()),
            fusedres.SkipInit(branch(), 0.5),
            fusedres.LayerScale(branch(), 8, initial=0.3),
            fusedres.StochasticDepth(branch(), 0.3),
            fusedres.HighwayConv2d(8, with_norm=True),
            fusedres.SEBasicBlock(8, 8, reduction=2),
            fusedres.WideBlock(8, 8),
            fusedres.PreActBasicBlock(8, 16, 2, nn.Conv2d(8, 16, 1, 2, bias=False)),
            fusedres.PreActBottleneck(16, 4),
            fusedres.ResNeXtBottleneck(16, 4, groups=2, base_width=64),
            fusedres.PlainBlock(16, 16),
        )
        self.classifier = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class PostNorm(nn.Module):
    """z = LN(x + F(x)), with F the sum of two terms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.first(x)
        return self.norm(h + self.second(torch.relu(h)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (models.resnet20, 9),
    "preact_resnet20": (models.preact_resnet20, 9),
    "plain20": (models.plain20, 9),
    "designs": (lambda: Designs().eval(), 11),
    "fused resnet18": (lambda: fusedres.fuse(torchvision.models.resnet18(num_classes=10)), 8),
    "fused resnet50, eval": (lambda: fusedres.fuse(torchvision.models.resnet50(num_classes=10)).eval(), 16),
    "timm's resnetv2": (lambda: timm.create_model("resnetv2_50", num_classes=10), 16),
    "timm's vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=2), 2),
    "timm's swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=10).eval(), 12),
    "torchvision's convnext": (lambda: torchvision.models.convnext_tiny(num_classes=10).eval(), 18),
}


def batch(size: int = 32, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, size, size, dtype=dtype), torch.tensor([1, 3])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_parts_add_up_to_autograds_gradient(name: str) -> None:
    torch.manual_seed(0)
    make, count = NETWORKS[name]
    model = make().double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = gradient_flow(model, *batch())
    assert len(found.networks[0].blocks) == count
    assert found.difference < 1e-12
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for block in found.networks[0].blocks:
        assert block.total <= block.shortcut + block.branch + 1e-12
        module = model.get_submodule(block.name)
        assert block.total > 0 and (block.branch > 0) != isinstance(module, fusedres.ReZero)
        assert (block.shortcut > 0) != isinstance(module, fusedres.PlainBlock)


def test_the_shortcuts_part_is_the_outputs_gradient_where_nothing_acts_after_the_add() -> None:
    torch.manual_seed(0)
    model, (images, labels) = models.preact_resnet20().double(), batch()
    seen = {each.block.name: each for each in observe(model, images, labels)}
    found = [
        each for each in gradient_flow(model, images, labels).networks[0].blocks if seen[each.name].block.is_identity
    ]
    assert len(found) == 7
    for each in found:
        observed = seen[each.name]
        assert torch.equal(observed.block.after(observed.output, observed.x), observed.output)
        assert each.shortcut == pytest.approx(observed.grad_output.norm().item(), rel=1e-14)


def test_a_block_is_its_parts() -> None:
    torch.manual_seed(0)
    model = Designs().double().eval()
    x = model.stem(batch()[0])
    for block in residual_blocks(model):
        expected = block.module(x)
        assert torch.allclose(block.apply(x, x), expected, rtol=1e-12, atol=1e-12)
        if block.has_shortcut:
            kept = x.clone()
            assert block.without_branch(x).shape == expected.shape
            assert torch.equal(x, kept)
        x = expected


def test_sums_of_sums_are_taken_apart() -> None:
    torch.manual_seed(0)
    module = PostNorm().double()
    [block] = residual_blocks(nn.Sequential(module))
    x = torch.randn(4, 8, dtype=torch.float64)
    assert block.is_identity
    torch.testing.assert_close(block.after(x, x), module.norm(x))
    h = module.first(x)
    assert torch.allclose(block.branch(x), h + module.second(torch.relu(x + h)))
    assert torch.equal(block.shortcut(x), x)


def test_a_model_without_blocks_and_wrong_names_are_said() -> None:
    with pytest.raises(ValueError, match="Sequential must have modules that add a shortcut"):
        residual_blocks(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="names must be those of modules of the model, got 'layer9'"):
        residual_blocks(models.resnet20(), ["layer9"])
    with pytest.raises(ValueError, match=r"the model \(a CifarNetwork\) must be a residual block: convolutions"):
        gradient_flow(models.resnet20(), *batch(dtype=torch.float32), names=[""])
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        residual_blocks(3)
    with pytest.raises(ValueError, match=r"blocks.3 must not drop its branch, got rate 0.3; call model.eval\(\)"):
        residual_blocks(Designs())


def test_random_numbers_are_found_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), fusedres.WideBlock(8, 8, dropout=0.5), nn.Flatten()).double()
    with pytest.raises(ValueError, match=r"does it draw random numbers \(call model.eval\(\)\)"):
        gradient_flow(model, *batch(8))


class Overwrites(nn.Module):
    """Its first step writes over its input, so that the shortcut carries relu(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(x)) + x


def test_a_block_that_writes_over_its_input_is_found_out() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Overwrites(), nn.Flatten()).double()
    with pytest.raises(ValueError, match=r"or write over its input\?"):
        gradient_flow(model, *batch(8))


class Odd(nn.Module):
    """Blocks with unusual sums, one at a time."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.7))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            x = x * mask
        if self.kind == "two inputs":
            return (x + self.a(x)) + (x + self.b(x))
        if self.kind == "reshaped":
            h = (self.a(x) + x).view(-1, 2, 4).flatten(1)
            return self.b(h) + h
        if self.kind == "scaled":
            return self.a(x) + x * self.scale
        return x + self.a(x)


@pytest.mark.parametrize("kind", ["two inputs", "reshaped", "scaled", "default"])
def test_unusual_sums_are_taken_apart(kind: str) -> None:
    torch.manual_seed(0)
    module = Odd(kind).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    [block] = residual_blocks(nn.Sequential(module))
    expected = {"two inputs": 2 * x, "scaled": x * module.scale}.get(kind, x)
    torch.testing.assert_close(block.shortcut(x), expected)
    torch.testing.assert_close(block.branch(x) + expected, module(x))
    assert block.is_identity == (kind in ("reshaped", "default"))
    model = nn.Sequential(nn.Linear(8, 8), module, nn.Linear(8, 4)).double()
    assert gradient_flow(model, x, torch.arange(4)).difference < 1e-12


def test_the_outer_block_is_chosen_where_a_sum_is_in_its_branch() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Odd("default")

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.attention(x))

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Outer(), Outer()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    assert [block.name for block in residual_blocks(nn.Sequential(Stage()))] == ["0.first", "0.second"]


def test_blocks_that_cannot_be_traced_are_named() -> None:
    class Branching(Odd):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + self.a(x) if x.sum() > 0 else x

    class BranchingBlock(Branching):
        pass

    with pytest.warns(UserWarning, match=r"1 modules were left out \(1: torch.fx cannot trace its forward"):
        found = residual_blocks(nn.Sequential(Odd("default"), BranchingBlock("")))
    assert [block.name for block in found] == ["0"]


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = timm.create_model("resnetv2_50", num_classes=10)
    sums: list[float] = []
    model.stages[0].blocks[0].register_forward_hook(lambda module, args, output: sums.append(output.sum().item()))
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.no_grad():
        images, labels = torch.zeros(2, 3, 32, 32), torch.tensor([1, 3])
        assert len(residual_blocks(model)) == 16
        found = gradient_flow(model, images, labels)
    assert torch.equal(torch.get_rng_state(), state) and not math.isnan(found.difference)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_small_random_branches_are_found_out() -> None:
    branch_of = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    model = nn.Sequential(nn.Linear(8, 8), fusedres.LayerScale(branch_of, 8, initial=1e-6), nn.Linear(8, 4))
    x = torch.randn(16, 8)
    for call in (lambda: gradient_flow(model, x, torch.arange(16) % 4), lambda: unrolling(model, x)):
        with pytest.raises(ValueError, match="does it draw random numbers"):
            call()
    assert gradient_flow(model.eval(), x, torch.arange(16) % 4).difference < 1e-4


def test_a_block_that_is_called_by_name_is_said() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = fusedres.PreActBasicBlock(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x=x).flatten(1)

    with pytest.raises(ValueError, match="a PreActBasicBlock must be called with one tensor, got x"):
        gradient_flow(ByName().double(), *batch(8))


class Passing(nn.Module):
    """Calls a block with a mask."""

    def __init__(self, mask: Tensor | None) -> None:
        super().__init__()
        self.block, self.mask = Odd("default"), mask

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.block(x, mask=self.mask))


def test_a_block_may_be_called_with_its_defaults_but_not_with_more() -> None:
    x, labels = torch.randn(4, 8), torch.arange(4)
    assert gradient_flow(nn.Sequential(nn.Linear(8, 8), Passing(None)), x, labels).difference < 1e-5
    with pytest.raises(ValueError, match="Odd must be called with one tensor, got Tensor, mask"):
        gradient_flow(nn.Sequential(nn.Linear(8, 8), Passing(torch.ones(8))), x, labels)


def test_a_block_that_is_called_twice_has_two_rows() -> None:
    torch.manual_seed(0)
    block = fusedres.PreActBasicBlock(8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), block, block, nn.Flatten(), nn.LazyLinear(10)).double()
    model(batch(8)[0])
    found = gradient_flow(model, *batch(8))
    assert [each.name for each in found.networks[0].blocks] == ["1", "1"]
    assert found.difference < 1e-12


def test_gradients_of_plain_layers_grow_as_mean_field_theory_says() -> None:
    torch.manual_seed(0)
    layers, width = 30, 400
    h = first = torch.randn(256, width, dtype=torch.float64, requires_grad=True)
    for _ in range(layers):
        weight = torch.randn(width, width, dtype=torch.float64) * math.sqrt(2 / width)
        h = torch.relu(F.batch_norm(h @ weight, None, None, training=True))
    grad = torch.autograd.grad(h, first, torch.randn_like(h))[0]
    growth = (grad.norm() / math.sqrt(grad.numel())).item() ** (1 / layers)
    assert growth == pytest.approx(PLAIN_GROWTH, abs=0.03)


def test_unrolling_holds_to_rounding_for_pre_activation_alone() -> None:
    torch.manual_seed(0)
    images = batch()[0]
    exact = unrolling(models.preact_resnet20().double(), images)
    assert [len(chain.blocks) for chain in exact.chains] == [3, 2, 2]  # projections open the later stages
    assert max(error for chain in exact.chains for error in chain.errors) < 1e-14
    in_32_bits = unrolling(models.preact_resnet20(), images.float())
    assert 1e-9 < max(error for chain in in_32_bits.chains for error in chain.errors) < 1e-5
    reshaping = timm.create_model("swin_tiny_patch4_window7_224", img_size=224, depths=(2,), num_heads=(3,)).eval()
    swin = unrolling(reshaping.double(), torch.randn(1, 3, 224, 224, dtype=torch.float64))
    assert max(error for chain in swin.chains for error in chain.errors) < 1e-14
    cut_off = unrolling(models.resnet20().double(), images)
    assert min(error for chain in cut_off.chains for error in chain.errors) > 0.01
    with pytest.raises(ValueError, match="CifarNetwork must have blocks whose shortcut is the identity, got none"):
        unrolling(models.plain20(), images.float())


@pytest.mark.parametrize("skip", SKIPS)
def test_sigmoid_chains_have_the_derivatives_of_the_closed_form(skip: str) -> None:
    chain = sigmoid_chain(skip, weight=1.0, layers=30)
    assert chain.difference < 1e-12
    for derivative, bound in zip(chain.derivatives, chain.bounds, strict=True):
        assert derivative >= bound if skip == "around" else 0 < derivative <= bound
    assert (chain.derivatives[-1] > 1) == (skip == "around")


def test_an_unknown_skip_is_said() -> None:
    with pytest.raises(ValueError, match="skip must be one of none, inside, around, got 'over'"):
        sigmoid_chain("over")
