"""fuse, unfuse and report: what changes in a model, what does not, what stays unfused and why."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from fusion import expect_paths, fused_twin, label, stock_case
from reference import build, inputs, randomize, run
from shapes import CORE, Case, case
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models import resnet18, resnet34, resnet50, resnext50_32x4d, wide_resnet50_2
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
    """Parameters, buffers, names, modes, requires_grad and layout stay; an optimizer made before fuse() stays valid."""
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


# --- what stays unfused


class Halved(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Quantized(nn.Conv2d):
    """A convolution whose weight is rounded at each call, as quantization-aware training does."""

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
    block.downsample.insert(0, nn.AvgPool2d(2, ceil_mode=True))


def with_strided(block: nn.Module, name: str) -> None:
    """A vector of a BatchNorm as every second element of a longer one."""
    old = getattr(block.bn2, name)
    longer = torch.stack([old.detach(), torch.full_like(old, 7)], dim=1)[:, 0]
    setattr(block.bn2, name, nn.Parameter(longer) if isinstance(old, nn.Parameter) else longer)


def with_instance_forward(block: nn.Module) -> None:
    bn1 = block.bn1
    bn1.forward = lambda x: nn.BatchNorm2d.forward(bn1, x) + 1


# What makes a block unusual, and words that the reason must hold.
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
    """Reported with its reason, and every number is the stock block's bit by bit; looked at anew at each call."""
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
    """The blocks fall back with the reason; in eval every number is the stock model's after the same conversion."""
    block, x, _ = stock_case(SMALL, mode="eval")
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(fused_twin(block))
    stock = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert "SyncBatchNorm" in fusedres.report(twin)[0].reason
    with expect_paths(unfused=1):
        assert torch.equal(twin(x), stock(x))


def test_grouped_convolutions_match_resnext() -> None:
    """ResNeXt's blocks are fused, or reported with the reason; either way they compute what torchvision's do."""
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
    """torch.func: other parameters for one call, gradients of them, and nothing of the module's own is touched."""
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
    """jvp and vmap over a fused block in eval are those of the stock block."""
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
    """Model.to, .half, .apply and .requires_grad_ after fuse() work as on the stock model."""
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
