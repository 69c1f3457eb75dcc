"""The fused stem of a ResNet against torchvision's: numbers, gradients, what is saved, when it runs unfused and why.

The model is a ResNet whose layers, average pool and classifier are identities. Inputs and weights of the convolution
are small integers: its output is exact in every dtype, so windows have the same winners in all of them.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from eager import trust
from fusion import FORMATS, expect_paths, label
from reference import Values, collect, randomize, run, separate, set_mode, stem_oracle
from tolerance import HALF, check
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres.autograd import path_counts

NCHW, NHWC = FORMATS
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FUSED = {"stem_forward": 1, "stem_backward": 1}


def stem(
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = NCHW,
    mode: str = "train",
    size: tuple[int, int] = (15, 18),
    channels: tuple[int, int] = (3, 19),
    **norm: object,
) -> tuple[nn.Module, Tensor, Tensor]:
    """A stock model that is its stem alone, a batch of images, and a gradient of its flat output."""
    with torch.device("meta"):
        model = ResNet(BasicBlock, [1, 1, 1, 1])
    for name in ("layer1", "layer2", "layer3", "layer4", "avgpool", "fc"):
        setattr(model, name, nn.Identity())
    model.conv1 = nn.Conv2d(*channels, 7, 2, 3, bias=False)
    model.bn1 = nn.BatchNorm2d(channels[1], **norm)  # type: ignore[arg-type]
    randomize(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        model.conv1.weight.copy_(torch.randint(-1, 2, model.conv1.weight.shape, generator=generator))
    x = torch.randint(-2, 3, (4, channels[0], *size), generator=generator).to(dtype).to(memory_format=memory_format)
    model = set_mode(model.to(dtype=dtype, memory_format=memory_format), mode)
    if model.bn1.bias is not None:
        separate(model, x)
    trust(model, x)
    return model, x, torch.randn(shape_of(model, x), generator=generator).to(dtype)


def shape_of(model: nn.Module, x: Tensor) -> torch.Size:
    with torch.no_grad():
        return copy.deepcopy(model)(x).shape


def twin_of(model: nn.Module, conv: str = "auto") -> nn.Module:
    twin = fusedres.fuse(copy.deepcopy(model), conv=conv)
    if conv == "fused":  # fuse() leaves it to what was measured
        twin.fused_conv = conv
    assert [row.fused for row in fusedres.report(twin)] == [True]
    return twin


@pytest.mark.parametrize("size", [(15, 18), (9, 2), (1, 1), (4, 30)])
@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("dtype", DTYPES, ids=label)
def test_outputs_gradients_and_statistics(
    dtype: torch.dtype, memory_format: torch.memory_format, mode: str, size: tuple[int, int]
) -> None:
    model, x, grad = stem(dtype, memory_format, mode, size)
    eager = run(copy.deepcopy(model), x, grad)
    with expect_paths(**FUSED):
        got = run(twin_of(model), x, grad)
    check(got, eager, stem_oracle(model, x, grad), dtype, f"{mode} {size}")


def off_the_interpreter(backend: str) -> None:
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("CPU tensors go through the interpreter, which is off where there is a GPU")


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_other_backends(backend: str, mode: str) -> None:
    off_the_interpreter(backend)
    model, x, grad = stem(torch.float32, NHWC, mode)
    eager = run(copy.deepcopy(model), x, grad)
    with fusedres.use_backend(backend), expect_paths(**FUSED):
        got = run(twin_of(model), x, grad)
    check(got, eager, stem_oracle(model, x, grad), torch.float32, backend)


@pytest.mark.parametrize("dtype", HALF, ids=label)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_autocast(dtype: torch.dtype, mode: str) -> None:
    """float32 parameters and float32 or half images; dtypes of the output and of every gradient are eager's."""
    model, x, grad = stem(torch.float32, NHWC, mode)
    for entered in (x, x.to(dtype)):
        trust(model, entered, dtype)
        eager = run(copy.deepcopy(model), entered, grad, autocast=dtype)
        with expect_paths(**FUSED):
            got = run(twin_of(model), entered, grad, autocast=dtype)
        check(got, eager, stem_oracle(model, entered, grad), dtype, f"{mode}, input {entered.dtype}")


@pytest.mark.parametrize(
    "norm",
    [{"momentum": None}, {"momentum": 0.7}, {"eps": 0.1}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_batch_norm_options(norm: dict[str, object], mode: str) -> None:
    model, x, grad = stem(torch.float64, NHWC, mode, **norm)
    twin = twin_of(model)
    for _ in range(2):
        eager, got = run(model, x, grad), run(twin, x, grad)
        assert got.keys() == eager.keys()
        for name, value in eager.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("wanted", [(), ("x",), ("conv1",), ("bn1",), ("x", "bn1"), ("conv1", "bn1")], ids=str)
def test_only_wanted_gradients_are_made(wanted: tuple[str, ...]) -> None:
    model, x, grad = stem(torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] in wanted)
    twin = twin_of(model)
    grads = []
    for each in (model, twin):
        leaf = x.clone().requires_grad_("x" in wanted)
        out = each(leaf)
        assert out.requires_grad == bool(wanted)
        if wanted:
            out.backward(grad)
        grads.append({"x": leaf.grad} | {name: p.grad for name, p in each.named_parameters()})
    for name, value in grads[0].items():
        assert (grads[1][name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(grads[1][name], value, rtol=1e-9, atol=1e-10, msg=name)


class Listing(TorchDispatchMode):
    """The operators that ran, and what convolution_backward was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: set[str] = set()
        self.masks: list[list[bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.ran.add(func._schema.name)
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[10]))
        return func(*args, **(kwargs or {}))


def test_images_without_gradient_cost_no_dgrad_and_nothing_pointwise_runs() -> None:
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model)
    with Listing() as listing:
        twin(x).backward(grad)
    assert listing.masks == [[False, True, False]]
    ours = {name for name in listing.ran if name.startswith("fusedres::")}
    assert ours == {"fusedres::bn_statistics", "fusedres::bn_relu_maxpool", "fusedres::bn_relu_maxpool_backward_"}
    assert not any(
        word in name for name in listing.ran for word in ("batch_norm", "aten::relu", "threshold", "max_pool")
    )


def test_saved_bytes_against_eager() -> None:
    """Eager: y, its ReLU, 64-bit indices. Fused: y, a byte an element of the pooled output. Of y: 2.5 and 1.1."""
    model, x, _ = stem(memory_format=NHWC, size=(64, 64), channels=(3, 64))

    def saved(each: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            each(x)
        return sum(sizes.values())

    assert saved(twin_of(model)) < 0.5 * saved(model)


@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
@pytest.mark.parametrize("weight_format", FORMATS, ids=label)
def test_layouts_are_torchs(memory_format: torch.memory_format, weight_format: torch.memory_format) -> None:
    """NCHW where images and weight are; the gradient of the images has their layout."""
    model, x, _ = stem()
    model.to(memory_format=weight_format)
    twin, seen = twin_of(model), []
    twin.layer1.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    x = x.to(memory_format=memory_format).requires_grad_()
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            out = twin(x)
        expected = NCHW if memory_format == weight_format == NCHW else NHWC
        assert seen.pop().is_contiguous(memory_format=expected)
        if out.requires_grad:
            out.sum().backward()
            assert x.grad.is_contiguous(memory_format=memory_format)


# --- a convolution of the package's own


def run_images(model: nn.Module, x: Tensor, grad: Tensor, autocast: torch.dtype | None = None) -> Values:
    """`run` with images that need no gradient, as in training."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = model(x)
    out.backward(grad.to(out.dtype))
    return collect(model, x, out)


OWN = [("reference", m, d, f) for m in ("train", "eval", "frozen") for d in DTYPES[:2] for f in FORMATS]
OWN += [("triton", "train", torch.float32, NCHW), ("triton", "train", torch.float16, NHWC)]
OWN += [("triton", "eval", torch.float64, NHWC), ("triton", "frozen", torch.float32, NHWC)]


@pytest.mark.parametrize(("backend", "mode", "dtype", "memory_format"), OWN, ids=label)
def test_own_convolution(backend: str, mode: str, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """With images that need a gradient dy is stored, else it is formed on load."""
    off_the_interpreter(backend)
    model, x, grad = stem(dtype, memory_format, mode)
    oracle = stem_oracle(model, x, grad)
    for execute in (run, run_images):
        eager = execute(copy.deepcopy(model), x, grad)
        with fusedres.use_backend(backend), expect_paths(**FUSED):
            got = execute(twin_of(model, "fused"), x, grad)
        assert got.keys() == eager.keys()
        check(got, eager, oracle, dtype, f"{backend} {mode} {execute.__name__}")
    with torch.no_grad(), fusedres.use_backend(backend):
        assert torch.equal(twin_of(model, "fused")(x), got["out"])


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_own_convolution_under_autocast(backend: str) -> None:
    off_the_interpreter(backend)
    model, x, grad = stem(torch.float32, NHWC)
    trust(model, x, torch.float16)
    eager = run_images(copy.deepcopy(model), x, grad, torch.float16)
    with fusedres.use_backend(backend), expect_paths(**FUSED):
        got = run_images(twin_of(model, "fused"), x, grad, torch.float16)
    assert got["grad.conv1.weight"].dtype == torch.float32
    check(got, eager, stem_oracle(model, x, grad), torch.float16, backend)


@pytest.mark.parametrize("wanted", [("conv1",), ("bn1.weight",), ("bn1.bias", "conv1"), ("maxpool", "x")], ids=str)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_own_convolution_makes_only_wanted_gradients(wanted: tuple[str, ...], mode: str, backend: str) -> None:
    off_the_interpreter(backend)
    model, x, grad = stem(torch.float64, mode=mode)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(wanted))
    grads = []
    for each in (model, twin_of(model, "fused")):
        leaf = x.clone().requires_grad_("x" in wanted)
        with fusedres.use_backend(backend):
            each(leaf).backward(grad)
        grads.append({"x": leaf.grad} | {name: p.grad for name, p in each.named_parameters()})
    for name, value in grads[0].items():
        assert (grads[1][name] is None) == (value is None), name
        if value is not None:
            torch.testing.assert_close(grads[1][name], value, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_gradcheck_of_an_own_convolution(mode: str, backend: str) -> None:
    """Of the parameters alone: that is where dy is formed on load."""
    off_the_interpreter(backend)
    model, x, _ = stem(torch.float64, NHWC, mode, (7, 6), (1, 3))
    model.conv1 = nn.Conv2d(1, 3, 3, 2, 1, bias=False).double()
    x = x + 0.3 * torch.randn_like(x)  # no ties: there is no derivative at one
    twin = twin_of(model, "fused")
    before = path_counts.copy()
    with fusedres.use_backend(backend):
        fast = backend == "triton"  # the interpreter takes its time
        assert torch.autograd.gradcheck(lambda *_: twin(x), tuple(twin.parameters()), fast_mode=fast)
    assert path_counts["stem_backward"] > before["stem_backward"]
    assert path_counts["stem_composite_backward"] == before["stem_composite_backward"]


def test_operators_of_an_own_convolution() -> None:
    """No library's convolution, no pass for statistics, and no dy; with the cpu backend the library's all the same."""
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model, "fused").to(memory_format=NHWC)
    with fusedres.use_backend("reference"), Listing() as listing:
        twin(x).backward(grad)
    ours = {name.removeprefix("fusedres::") for name in listing.ran if name.startswith("fusedres::")}
    assert ours == {
        "conv_fprop",
        "bn_finalize",
        "bn_relu_maxpool",
        "bn_relu_maxpool_reduce",
        "bn_backward_coefficients",
        "bn_relu_maxpool_wgrad",
        "conv_wgrad_finalize",
    }
    with fusedres.use_backend("cpu"), Listing() as listing:
        twin(x).backward(grad)
    assert listing.masks == [[False, True, False]]


def test_an_own_convolution_compiles_whole() -> None:
    model, x, grad = stem(memory_format=NHWC)
    with fusedres.use_backend("reference"):
        eager = run_images(copy.deepcopy(model), x, grad)
        got = run_images(torch.compile(twin_of(model, "fused"), fullgraph=True, backend="aot_eager"), x, grad)
    got = {name.replace("_orig_mod.", ""): value for name, value in got.items()}
    check(got, eager, stem_oracle(model, x, grad), torch.float32)
    torch.compiler.reset()


def test_grouped_convolutions_are_the_library_s() -> None:
    model, _, _ = stem(torch.float64)
    model.conv1 = nn.Conv2d(4, 18, 3, 1, 1, bias=False, groups=2).double()
    model.bn1 = nn.BatchNorm2d(18).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    with fusedres.use_backend("reference"), Listing() as listing:
        torch.testing.assert_close(twin_of(model, "fused")(x), model(x), rtol=1e-10, atol=1e-11)
    assert "fusedres::conv_fprop" not in listing.ran


# --- autograd


@pytest.mark.parametrize("mode", ["train", "eval", "frozen"])
@pytest.mark.parametrize("memory_format", FORMATS, ids=label)
def test_gradcheck(mode: str, memory_format: torch.memory_format) -> None:
    model, x, _ = stem(torch.float64, memory_format, mode, (7, 9), (2, 3))
    x = (x + 0.3 * torch.randn_like(x)).requires_grad_()  # no ties: there is no derivative at one
    twin = twin_of(model)
    parameters = list(twin.parameters())
    with torch.no_grad():
        parameters[0].add_(0.1 * torch.randn_like(parameters[0]))
    before = path_counts.copy()
    assert torch.autograd.gradcheck(lambda x, *_: twin(x), (x, *parameters))
    assert path_counts["stem_backward"] > before["stem_backward"]
    assert path_counts["stem_composite_backward"] == before["stem_composite_backward"]
    assert torch.autograd.gradgradcheck(lambda x, *_: twin(x), (x, *parameters), fast_mode=True)
    assert path_counts["stem_composite_backward"] > before["stem_composite_backward"]
    assert path_counts["stem_unfused"] == before["stem_unfused"]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_create_graph_and_batched_gradients_change_nothing(mode: str) -> None:
    model, x, grad = stem(torch.float64, NHWC, mode)
    twin = twin_of(model)
    leaves = (x.requires_grad_(), *twin.parameters())
    statistics = {name: buffer.clone() for name, buffer in run_buffers(copy.deepcopy(twin), x)}
    out = twin(x)
    with expect_paths(stem_composite_backward=1):
        second = torch.autograd.grad(out, leaves, grad, create_graph=True)
    with expect_paths(stem_composite_backward=1):
        batched = torch.autograd.grad(
            out, leaves, torch.stack([grad, 2 * grad]), is_grads_batched=True, retain_graph=True
        )
    with expect_paths(stem_backward=2):
        kept = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        last = torch.autograd.grad(out, leaves, grad)
    for a, b, c, d in zip(second, batched, kept, last, strict=True):
        assert a.requires_grad and torch.equal(c, d)
        torch.testing.assert_close(a.detach(), c, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(b[1], 2 * c, rtol=1e-9, atol=1e-10)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in twin.named_buffers())


def run_buffers(model: nn.Module, x: Tensor) -> list[tuple[str, Tensor]]:
    model(x)
    return list(model.named_buffers())


def test_the_gradient_that_comes_in_is_left_as_it_is() -> None:
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model)
    out = twin(x)
    kept, result = grad.clone(), out.detach().clone()
    out.backward(grad)
    assert torch.equal(grad, kept) and torch.equal(out, result)


# --- fuse, unfuse, report


def test_names_of_the_report_and_the_filter() -> None:
    model = stem()[0]
    nest = nn.ModuleDict({"backbone": model, "other": nn.Linear(2, 2)})
    before = set(ResNet.__dict__), set(model.__dict__)
    fusedres.fuse(nest, filter=lambda name, _: name != "backbone")
    assert [tuple(row) for row in fusedres.report(nest)] == [("backbone stem", "stem", False, "not selected by fuse()")]
    fusedres.fuse(nest, memory="min", conv="fused")
    assert [tuple(row) for row in fusedres.report(nest)] == [("backbone stem", "stem", True, "")]
    assert type(model) is fusedres.FusedResNet and model.fused_conv == "measured"
    fusedres.unfuse(nest)
    assert type(model) is ResNet and (set(ResNet.__dict__), set(model.__dict__)) == before


def test_copies_and_files_are_fused_and_independent() -> None:
    model, x, grad = stem(memory_format=NHWC)
    twin = twin_of(model)
    file = io.BytesIO()
    torch.save(twin, file)
    file.seek(0)
    copies = copy.deepcopy(twin), pickle.loads(pickle.dumps(twin)), torch.load(file, weights_only=False)
    want = run(twin, x, grad)
    for copied in copies:
        assert type(copied) is fusedres.FusedResNet
        with expect_paths(**FUSED):
            got = run(copied, x, grad)
        assert all(torch.equal(value, got[name]) for name, value in want.items())
    again = stem()[0]
    again.load_state_dict(twin.state_dict(), strict=True)


def test_freezing_leaves_the_stem_as_it_is() -> None:
    model, x, _ = stem(mode="eval")
    twin = twin_of(model)
    want = twin(x)
    fusedres.freeze(twin)
    with torch.no_grad(), expect_paths(stem_forward=1):
        assert torch.equal(twin(x), want)


def test_a_subclass_and_a_forward_on_the_instance_are_left_alone() -> None:
    class Mine(ResNet):
        def _forward_impl(self, x: Tensor) -> Tensor:
            return x

    for name in ("forward", "_forward_impl"):
        model = stem()[0]
        setattr(model, name, lambda x: 2 * x)
        fusedres.fuse(model)
        assert type(model) is ResNet and "instance" in fusedres.report(model)[0].reason
    with torch.device("meta"):
        mine = Mine(BasicBlock, [1, 1, 1, 1])
    fusedres.fuse(mine)
    assert type(mine) is Mine and "Mine" in fusedres.report(mine)[0].reason


# --- what runs unfused


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Marked(Tensor):
    """A tensor subclass."""


def with_pool(**options: object) -> Callable[[nn.Module], object]:
    return lambda m: setattr(m, "maxpool", nn.MaxPool2d(**{"kernel_size": 3, "stride": 2, "padding": 1, **options}))


# What makes a stem unusual, and words that the reason must hold.
UNUSUAL: dict[str, tuple[Callable[[nn.Module], object], tuple[str, ...]]] = {
    "hook on conv1": (lambda m: m.conv1.register_forward_hook(lambda _, __, out: out * 2), ("hook", "conv1")),
    "hook on bn1": (lambda m: m.bn1.register_forward_pre_hook(lambda _, a: (a[0] + 1,)), ("hook", "bn1")),
    "hook on relu": (lambda m: m.relu.register_forward_hook(lambda _, __, out: out + 1), ("hook", "relu")),
    "hook on maxpool": (lambda m: m.maxpool.register_forward_hook(lambda _, __, out: out + 1), ("hook", "maxpool")),
    "identity for maxpool": (lambda m: setattr(m, "maxpool", nn.Identity()), ("maxpool", "Identity")),
    "kernel of 2": (with_pool(kernel_size=2, padding=0), ("maxpool", "kernel_size")),
    "stride of 1": (with_pool(stride=1), ("maxpool", "stride")),
    "no padding": (with_pool(padding=0), ("maxpool", "padding")),
    "dilation": (with_pool(dilation=2), ("maxpool", "dilation")),
    "ceil_mode": (with_pool(ceil_mode=True), ("maxpool", "ceil_mode")),
    "conv bias": (lambda m: setattr(m, "conv1", nn.Conv2d(3, 19, 7, 2, 3)), ("conv1", "bias")),
    "group norm": (lambda m: setattr(m, "bn1", nn.GroupNorm(1, 19)), ("bn1", "GroupNorm")),
    "other activation": (lambda m: setattr(m, "relu", nn.LeakyReLU(0.1)), ("relu", "LeakyReLU")),
    "parametrized": (lambda m: parametrize.register_parametrization(m.conv1, "weight", Doubled()), ("parametriz",)),
    "instance forward": (lambda m: setattr(m.maxpool, "forward", lambda x: x[:, :, ::2]), ("maxpool", "forward")),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("what", UNUSUAL)
def test_an_unusual_stem_runs_unfused_with_identical_numbers(what: str, mode: str) -> None:
    alter, words = UNUSUAL[what]
    model, x, _ = stem(mode=mode)
    twin = twin_of(model)
    for each in (model, twin):
        torch.manual_seed(0)
        alter(each)
    (row,) = fusedres.report(twin)
    assert not row.fused
    assert all(word in row.reason for word in words), row.reason
    grad = torch.randn(shape_of(model, x))
    eager = run(model, x, grad)
    with expect_paths(stem_unfused=1):
        got = run(twin, x, grad)
    assert got.keys() == eager.keys()
    assert all(torch.equal(got[name], value) for name, value in eager.items())


def test_return_indices_and_sync_batch_norm_are_reasons() -> None:
    twin = twin_of(stem()[0])
    with_pool(return_indices=True)(twin)
    assert "return_indices" in fusedres.report(twin)[0].reason
    with_pool()(twin)
    assert fusedres.report(twin)[0].fused
    twin = nn.SyncBatchNorm.convert_sync_batchnorm(twin)
    assert "SyncBatchNorm" in fusedres.report(twin)[0].reason


def test_another_convolution_is_fine() -> None:
    """CIFAR's 3x3 with stride 1, and one channel in."""
    model, _, _ = stem(torch.float64)
    model.conv1 = nn.Conv2d(1, 19, 3, 1, 1, bias=False).double()
    x = torch.randn(2, 1, 9, 8, dtype=torch.float64)
    twin = twin_of(model)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-10, atol=1e-11)


def test_calls_that_run_unfused() -> None:
    model, x, _ = stem(mode="eval")
    twin = twin_of(model)
    with expect_paths(stem_unfused=1):
        assert type(twin(x.as_subclass(Marked))) is Marked
    with expect_paths(stem_unfused=1):
        torch.testing.assert_close(torch.func.vmap(twin)(x[None]), model(x)[None])
    with expect_paths(stem_unfused=1):
        assert twin(x[:0]).shape == model(x[:0]).shape
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with expect_paths(stem_unfused=1):
            assert torch.equal(twin(x), model(x))
    finally:
        handle.remove()


def test_errors_come_before_anything_is_updated() -> None:
    model, x, _ = stem()
    twin = twin_of(model)
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    with pytest.raises(ValueError, match=r"FusedResNet: x must have 3 channels .*got shape .*; "):
        twin(x[:, :2])
    with pytest.raises(TypeError, match=r"FusedResNet: conv1.weight must be torch.float64 like x, got torch.float32; "):
        twin(x.double())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        twin(x[:1, :, :1, :1])
    assert all(torch.equal(buffer, before[name]) for name, buffer in twin.named_buffers())


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_whole(mode: str) -> None:
    model, x, grad = stem(memory_format=NHWC, mode=mode)
    eager = run(copy.deepcopy(model), x, grad)
    twin = twin_of(model)
    got = run(torch.compile(twin, fullgraph=True, backend="aot_eager"), x, grad)
    got = {name.replace("_orig_mod.", ""): value for name, value in got.items()}
    check(got, eager, stem_oracle(model, x, grad), torch.float32, mode)
    torch.compiler.reset()


def test_launches_of_a_training_step() -> None:
    """On meta tensors Triton's launches are recorded: behind the statistics one forward, and three in backward."""
    from fusedres.kernels.triton_core.launch import record_launches

    model, x, _ = stem(memory_format=NHWC)
    twin, x = twin_of(model).to("meta"), x.to("meta")
    with fusedres.use_backend("triton"), record_launches() as launches:
        out = twin(x)
        out.backward(torch.empty_like(out))
    launches = [launch for launch in launches if "maxpool" in launch.name or "backward" in launch.name]
    assert [launch.name for launch in launches] == [
        "bn_relu_maxpool_kernel",
        "bn_relu_maxpool_reduce_kernel",
        "bn_backward_coefficients_kernel",
        "bn_relu_maxpool_apply_kernel",
    ]
    y, pooled = 4 * 19 * 8 * 9, 4 * 19 * 4 * 5  # elements, of 4 bytes; a place is one
    forward, reduce, _, apply = (launch.bytes() for launch in launches)
    assert 0 <= forward - (4 * y + 5 * pooled) < 1000
    assert 0 <= reduce - (4 * y + 5 * pooled) < 1000
    assert 0 <= apply - (8 * y + 5 * pooled) < 1000
