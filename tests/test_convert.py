"""fuse, unfuse and report: what changes in a model and what stays, copies and files, and hooks on a block itself."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from fusion import expect_paths, fused_twin, label, stock_case
from reference import build, randomize, run
from shapes import CORE, Case, case
from torch import nn
from torchvision.models import resnet18, resnet34, resnet50, wide_resnet50_2
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fusedres

SMALL = case("basic", "projection")


def small_resnet(block: type = BasicBlock, layers: tuple[int, ...] = (1, 1, 1, 1), **options: object) -> ResNet:
    return randomize(ResNet(block, list(layers), num_classes=5, **options), 3)  # type: ignore[arg-type, return-value]


# --- what fuse() does


@pytest.mark.parametrize(
    ("make", "kind", "count"),
    [
        (resnet18, "BasicBlock", 8),
        (resnet34, "BasicBlock", 16),
        (resnet50, "Bottleneck", 16),
        (wide_resnet50_2, "Bottleneck", 16),
    ],
)
def test_torchvision_models_are_fused_whole(make: Callable[[], nn.Module], kind: str, count: int) -> None:
    with torch.device("meta"):
        model = make()
    assert fusedres.fuse(model) is model
    blocks = {"BasicBlock": fusedres.FusedBasicBlock, "Bottleneck": fusedres.FusedBottleneck}
    assert sum(type(child) is blocks[kind] for child in model.modules()) == count
    assert type(model) is fusedres.FusedResNet
    assert [row.name for row in fusedres.report(model)] == ["(model) stem"] + [
        f"layer{layer}.{index}" for layer in (1, 2, 3, 4) for index in range(len(getattr(model, f"layer{layer}")))
    ]


def test_reports_on_the_parameters_device() -> None:
    for model in (resnet18(), resnet50()):
        fusedres.fuse(model)
        rows = fusedres.report(model)
        assert all(row.fused and row.reason == "" for row in rows)


def test_identities_and_states_stay() -> None:
    """Parameters, buffers, names, modes, requires_grad and layouts stay; an optimizer made before stays valid."""
    model = small_resnet().to(memory_format=torch.channels_last)
    model.layer1.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    before = dict(model.state_dict(keep_vars=True))
    modes = [child.training for child in model.modules()]
    names = [name for name, _ in model.named_modules()]
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    fusedres.fuse(model)
    after = dict(model.state_dict(keep_vars=True))
    assert list(after) == list(before)
    assert all(after[name] is tensor for name, tensor in before.items())
    assert [child.training for child in model.modules()] == modes
    assert [name for name, _ in model.named_modules()] == names
    assert not model.layer2[0].conv1.weight.requires_grad
    weight = model.layer3[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    old = weight.detach().clone()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, old)
    assert model.layer2[0].conv1.weight.grad is None


def test_fused_classes_are_torchvisions_own() -> None:
    assert issubclass(fusedres.FusedBasicBlock, BasicBlock)
    assert issubclass(fusedres.FusedBottleneck, Bottleneck)
    assert fusedres.FusedBasicBlock.expansion == 1
    assert fusedres.FusedBottleneck.expansion == 4
    assert issubclass(fusedres.FusedResNet, ResNet)
    model = fusedres.FusedResNet(fusedres.FusedBasicBlock, [2, 2, 2, 2])
    assert all(row.fused for row in fusedres.report(model))
    assert len(fusedres.report(model)) == 9


@pytest.mark.parametrize(
    ("stock", "fused"), [(BasicBlock, fusedres.FusedBasicBlock), (Bottleneck, fusedres.FusedBottleneck)]
)
def test_zero_init_residual_finds_fused_blocks(stock: type, fused: type) -> None:
    model = ResNet(fused, [1, 1, 1, 1], zero_init_residual=True)
    norms = [
        block.bn2 if stock is BasicBlock else block.bn3
        for layer in (1, 2, 3, 4)
        for block in getattr(model, f"layer{layer}")
    ]
    assert all(not norm.weight.any() for norm in norms)


def test_weights_load_strictly_both_ways() -> None:
    stock, fused = small_resnet(), ResNet(fusedres.FusedBasicBlock, [1, 1, 1, 1], num_classes=5)
    fused.load_state_dict(stock.state_dict(), strict=True)
    again = small_resnet()
    again.load_state_dict(fused.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), stock.state_dict().values(), strict=True))


def test_unfuse_restores_the_classes_and_nothing_of_fuse_remains() -> None:
    model = small_resnet(Bottleneck)
    before = [(type(child), set(child.__dict__)) for child in model.modules()]
    fusedres.fuse(model, memory="min")
    assert fusedres.unfuse(model) is model
    assert [(type(child), set(child.__dict__)) for child in model.modules()] == before
    assert not any(row.fused for row in fusedres.report(model))


def test_filter_selects_by_name_and_block() -> None:
    model = small_resnet()
    seen: list[tuple[str, nn.Module]] = []

    def chosen(name: str, block: nn.Module) -> bool:
        seen.append((name, block))
        return name.startswith("layer3")

    fusedres.fuse(model, filter=chosen)
    assert [name for name, _ in seen] == ["", "layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert all(model.get_submodule(name) is block for name, block in seen)
    rows = fusedres.report(model)
    assert [row.name for row in rows if row.fused] == ["layer3.0"]
    assert all(row.reason for row in rows if not row.fused)


def test_options_are_kept_on_the_blocks_and_may_be_changed_by_another_call() -> None:
    model = small_resnet()
    fusedres.fuse(model)
    assert {block.fused_memory for block in (model.layer1[0], model.layer4[0])} == {"auto"}
    fusedres.fuse(model, memory="min", conv="library", filter=lambda name, _: name == "layer4.0")
    assert (model.layer1[0].fused_memory, model.layer4[0].fused_memory) == ("auto", "min")
    assert (model.layer1[0].fused_conv, model.layer4[0].fused_conv) == ("auto", "library")
    assert fusedres.FusedBasicBlock.fused_memory == fusedres.FusedBottleneck.fused_memory == "auto"
    assert "fused_memory" not in model.state_dict()


@pytest.mark.parametrize(("option", "value"), [("memory", "less"), ("conv", "mine")])
def test_unknown_options_are_refused_before_anything_changes(option: str, value: str) -> None:
    model = small_resnet()
    with pytest.raises(ValueError, match=rf"fuse: {option} must be .*, got '{value}'"):
        fusedres.fuse(model, **{option: value})  # type: ignore[arg-type]
    assert not any(row.fused for row in fusedres.report(model))


@pytest.mark.parametrize("function", [fusedres.fuse, fusedres.unfuse, fusedres.report])
def test_only_modules_are_taken(function: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__}: model must be a torch.nn.Module, got int"):
        function(3)


def test_no_block_has_a_method_named_fuse() -> None:
    """timm's reparameterize_model calls every `fuse` method that it finds."""
    for block in (fusedres.FusedBasicBlock(4, 4), fusedres.FusedBottleneck(16, 4), fusedres.ZeroPadShortcut(2, 4, 2)):
        assert not hasattr(block, "fuse")
        assert not hasattr(block, "reparameterize")


def test_the_report_prints_as_a_table() -> None:
    model = small_resnet()
    fusedres.fuse(model)
    model.layer2[0].bn1.register_forward_hook(lambda *_: None)
    report = fusedres.report(model)
    assert isinstance(report, list)
    assert tuple(report[0]) == ("(model) stem", "stem", True, "")
    row = report[2]
    assert (row.name, row.kind, row.fused) == ("layer2.0", "BasicBlock", False)
    lines = str(report).splitlines()
    assert len([line for line in lines if "BasicBlock" in line]) == 4
    assert any("layer2.0" in line and row.reason in line for line in lines)
    assert str(fusedres.report(nn.Linear(2, 2)))


def test_a_block_by_itself_and_nested_blocks_are_found() -> None:
    block = build(SMALL)
    fusedres.fuse(block)
    assert type(block) is fusedres.FusedBasicBlock
    nest = nn.ModuleDict({"trunk": nn.Sequential(build(SMALL), nn.ModuleList([build(case("bottleneck", "identity"))]))})
    fusedres.fuse(nest)
    assert [row.name for row in fusedres.report(nest)] == ["trunk.0", "trunk.1.0"]
    assert all(row.fused for row in fusedres.report(nest))


def test_a_shared_block_is_fused_once() -> None:
    block = build(case("basic", "identity"))
    model = nn.Sequential(block, block)
    fusedres.fuse(model)
    with expect_paths(fused_forward=2, fused_backward=2):
        model(torch.randn(2, 8, 5, 5, requires_grad=True)).sum().backward()
    assert int(block.bn1.num_batches_tracked) == 2


# --- copies and files


def round_trips() -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(model: nn.Module) -> nn.Module:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    return {
        "deepcopy": copy.deepcopy,
        "pickle": lambda model: pickle.loads(pickle.dumps(model)),
        "torch.save": saved,
    }


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("case", CORE, ids=label)
def test_copies_are_fused_and_independent(case: Case, way: str) -> None:
    block, x, grad = stock_case(case)
    twin = fused_twin(block, "min")
    run(twin, x, grad)
    copied = round_trips()[way](twin)
    assert type(copied) is type(twin)
    assert copied.fused_memory == "min"
    assert [row.fused for row in fusedres.report(copied)] == [True]
    with expect_paths(fused_forward=2, fused_backward=2):
        first, second = run(twin, x, grad), run(copied, x, grad)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    shared = {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert not shared


def test_a_copy_of_a_fused_model_can_be_unfused() -> None:
    model = fusedres.fuse(small_resnet())
    copied = fusedres.unfuse(copy.deepcopy(model))
    assert type(copied.layer1[0]) is BasicBlock
    assert type(model.layer1[0]) is fusedres.FusedBasicBlock


# --- hooks on the block itself


def test_hooks_on_the_block_stay_and_fire() -> None:
    block, x, grad = stock_case(SMALL)
    fired: list[str] = []
    block.register_forward_pre_hook(lambda *_: fired.append("pre"))
    block.register_forward_hook(lambda *_: fired.append("forward"))
    block.register_full_backward_hook(lambda *_: fired.append("backward"))
    block.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))
    fusedres.fuse(block)
    assert fusedres.report(block)[0].fused
    with expect_paths(fused_forward=1, fused_backward=1):
        run(block, x, grad)
    assert fired == ["pre", "forward", "backward pre", "backward"]


def test_a_hook_on_the_block_may_change_its_output_and_input() -> None:
    block, x, grad = stock_case(SMALL, torch.float64)
    block.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    block.register_forward_hook(lambda _, args, out: out + args[0].mean())
    twin = fusedres.fuse(copy.deepcopy(block))
    eager, got = run(block, x, grad), run(twin, x, grad)
    for name, value in eager.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-11, msg=name)
