"""The choice "auto" follows a table of measured choices if one applies, and the numbers stay the same."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion import expect_paths, fused_twin, stock_case
from measured import CPU, bottleneck, following, table
from op_inputs import device as device_of
from reference import run
from shapes import Case, case
from test_blocks import prepared
from tolerance import check
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres import backends, dispatch, ops
from fusedres.autograd import UNIT_TENSORS
from fusedres.dispatch import LIBRARY, UNFUSED, Directions, Shape, Way, store
from fusedres.dispatch.table import batch_class
from fusedres.modules import choice, fused_block
from fusedres.modules.fused_block import plan_of
from fusedres.ops.launch import launches
from fusedres.values import Geometry, Gradient, Raw

OWN = Directions(True, True, True)
FPROP = Directions(True, False, False)
BOTTLENECK = case("bottleneck", "projection", planes=8, batch=2, height=6, width=6)
BASIC = case("basic", "identity", planes=8, batch=2, height=5, width=6)


def shape_of(block: nn.Module, x: Tensor, phase: str = "train", dtype: str = "float32") -> Shape:
    return Shape._make((*choice.shape_of(block.anatomy(), x), batch_class(x.shape[0]), dtype, phase))


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start without any table that was read before."""
    monkeypatch.setattr(dispatch, "_tables", {})


# The table's choices are used, and the numbers stay the same


class Products:
    """Counts this package's convolution products that run, by kernel size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.ran: Counter[tuple[str, str]] = Counter()
        found = launches(backend)
        for name, at in (("fprop", 1), ("dgrad", 1), ("wgrad", 2)):  # position of the weight or its height and width
            monkeypatch.setattr(found, f"conv_{name}", self._counting(name, getattr(found, f"conv_{name}"), at))

    def _counting(self, name: str, kernel: Callable[..., Any], at: int) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            size = args[at].shape[2:] if isinstance(args[at], Tensor) else args[at]
            self.ran["1x1" if tuple(size) == (1, 1) else "larger", name] += 1
            return kernel(*args)

        return counting


def matches_eager(block_case: Case, way: Way, backend: str, **paths: int) -> None:
    """Compare forward and backward with eager, under a table with this way for the block."""
    block, x, grad, eager, truth = prepared(block_case, torch.float32, torch.channels_last, "train")
    twin = fused_twin(block)
    where = torch.empty(0, device=device_of(backend, torch.float32)).device  # includes the device index
    twin = twin.to(where)
    with following(table({shape_of(twin, x): way}, backend), where), expect_paths(**paths):
        got = run(twin, x.to(where), grad.to(where))
    check({name: value.cpu() for name, value in got.items()}, eager, truth, torch.float32, f"{block_case} {way}")


@pytest.mark.parametrize(
    ("pixelwise", "larger"),
    [(FPROP, LIBRARY), (LIBRARY, FPROP), (Directions(False, True, False), Directions(False, False, True)), (OWN, OWN)],
)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_each_product_is_whose_the_table_says(
    backend: str, pixelwise: Directions, larger: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = Products(monkeypatch, backend)
    matches_eager(BOTTLENECK, Way(backend, pixelwise, larger), backend, fused_forward=1, fused_backward=1)
    wanted = {("1x1", name) for name in Directions._fields if getattr(pixelwise, name)}
    wanted |= {("larger", name) for name in Directions._fields if getattr(larger, name)}
    assert set(products.ran) == wanted
    if (pixelwise, larger) == (FPROP, LIBRARY):
        assert products.ran["1x1", "fprop"] == 3  # conv1, conv3 and the projection


@pytest.mark.parametrize("block_case", [BASIC, BOTTLENECK], ids=str)
def test_unfused_where_the_table_says_so(block_case: Case) -> None:
    matches_eager(block_case, UNFUSED, "cpu", unfused=1)


@pytest.mark.parametrize("one_pass", [False, True])
def test_statistics_before_the_convolution_where_the_table_says_so(
    one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_MIN_ROWS_A_CHANNEL", 1)
    block, x, _ = stock_case(BOTTLENECK, memory_format=torch.channels_last)
    twin = fused_twin(block)
    plan, tensors = plan_of(twin, x, "cpu", Way("cpu", one_pass=one_pass))
    assert plan.one_pass == (one_pass, one_pass) and len(tensors) == 4 * UNIT_TENSORS
    matches_eager(BOTTLENECK, Way("cpu", one_pass=one_pass), "cpu", fused_forward=1, fused_backward=1)


@pytest.mark.parametrize(
    "way", [UNFUSED, Way("reference"), Way("reference", larger=Directions(True, False, True))], ids=str
)
def test_the_stem_follows_too(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Counter()
    launches = fusedres.autograd.stem.launches("reference")
    for name in ("conv_fprop", "bn_relu_maxpool_wgrad"):
        kernel = getattr(launches, name)
        monkeypatch.setattr(launches, name, lambda *a, n=name, k=kernel: (own.update([n]), k(*a))[1])
    stock = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).to(torch.float64, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    model = fusedres.fuse(copy.deepcopy(stock), filter=lambda name, module: not name)
    paths = {"stem_unfused": 1} if way == UNFUSED else {"stem_forward": 1, "stem_backward": 1}
    with following(table({shape_of(model, x, dtype="float64"): way}, "reference")), expect_paths(**paths):
        out = model(x)
        out.sum().backward()
    expected = stock(x)
    expected.sum().backward()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.conv1.weight.grad, stock.conv1.weight.grad, rtol=1e-8, atol=1e-8)
    assert set(own) == ({"conv_fprop", "bn_relu_maxpool_wgrad"} if way.larger.fprop else set())


def test_training_and_inference_have_entries_of_their_own() -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    with following(table({shape_of(twin, x, "infer"): UNFUSED, shape_of(twin, x): Way("cpu")})):
        with expect_paths(fused_forward=1):
            twin(x)
        with expect_paths(unfused=1), torch.no_grad():
            twin(x)


def test_the_dtype_is_that_of_the_convolutions() -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    with following(table({shape_of(twin, x, dtype="bfloat16"): UNFUSED})):
        with expect_paths(fused_forward=1):
            twin(x)
        with expect_paths(unfused=1), torch.autocast("cpu", torch.bfloat16):
            twin(x)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_follows_for_sizes_that_are_fixed(dynamic: bool) -> None:
    torch._dynamo.reset()
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    ran = []
    unfused = fused_block.run_unfused
    four = torch.cat([x, x])
    with (
        pytest.MonkeyPatch.context() as patch,
        following(table({shape_of(twin, x): Way("cpu"), shape_of(twin, four): UNFUSED})),
    ):
        patch.setattr(fused_block, "run_unfused", lambda *a: (ran.append(len(a[2])), unfused(*a))[1])
        for images in (x, four, torch.cat([four, x])):
            torch.testing.assert_close(compiled(images), block(images), rtol=1e-4, atol=1e-4)
    assert ran == ([] if dynamic else [4, 6])  # 6 is nearer to 4 images
    torch._dynamo.reset()


# Explicit choices override the table


def test_min_keeps_the_stem_fused() -> None:
    stock = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    model = fusedres.fuse(stock, filter=lambda name, module: not name, memory="min")
    with following(table({shape_of(model, x): UNFUSED})), expect_paths(stem_forward=1):
        model(x)


@pytest.mark.parametrize("options", [{"conv": "library"}, {"conv": "fused"}, {"memory": "min"}], ids=str)
def test_arguments_of_fuse_win_over_unfused(options: dict[str, str]) -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block, **options)
    with following(table({shape_of(twin, x): UNFUSED})), expect_paths(fused_forward=1):
        twin(x)


def test_arguments_of_fuse_win_over_products() -> None:
    way = Way("reference", OWN, OWN, one_pass=True)
    block, x, _ = stock_case(BOTTLENECK, memory_format=torch.channels_last)
    for conv, memory, own, one_pass in (
        ("auto", "auto", OWN, True),
        ("library", "auto", LIBRARY, False),
        ("fused", "auto", OWN, False),
        ("library", "min", LIBRARY, True),
        ("auto", "min", OWN, True),
    ):
        twin = fused_twin(block, memory, conv)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(choice, "_MIN_ROWS_A_CHANNEL", 1)
            plan, _ = plan_of(twin, x, "reference", way)
        assert {unit.own for unit in plan.all_units} == {own} and plan.one_pass == (one_pass, one_pass)


def test_a_selected_backend_wins() -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    with following(table({shape_of(twin, x): UNFUSED})), expect_paths(fused_forward=1), fusedres.use_backend("cpu"):
        twin(x)
    with following(table({shape_of(twin, x): Way("reference", OWN, OWN)})):
        for backend, own in (("reference", OWN), ("cpu", LIBRARY), ("auto", OWN)):
            with fusedres.use_backend(backend):
                served = backends.backend_for(CPU)
                way = choice.measured_way(twin.anatomy(), x, served, "auto", "auto")
                plan, _ = plan_of(twin, x, way.backend if way else served, way)
            assert plan.units[0].own == own


def test_a_frozen_block_stays_frozen() -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last, mode="eval")
    twin = fusedres.freeze(fused_twin(block))
    with following(table({shape_of(twin, x, "infer"): UNFUSED})), expect_paths(frozen_forward=1), torch.no_grad():
        twin(x)


def test_a_frozen_block_on_a_gpu_follows() -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last, mode="eval")
    twin, x = fusedres.freeze(fused_twin(block)).to("meta"), x.to("meta")
    with (
        following(table({shape_of(twin, x, "infer"): UNFUSED}, "triton"), x.device),
        fusedres.use_backend("auto"),
        expect_paths(unfused=1),
        torch.no_grad(),
    ):
        twin(x)


# Shapes without an entry


def test_the_nearest_batch_then_the_nearest_sizes_then_the_librarys_convolutions() -> None:
    ways = {batch: Way("triton", Directions(True, False, batch == 16)) for batch in (16, 256)}
    found = table({bottleneck(batch=batch): way for batch, way in ways.items()}, "triton")
    default = Way("triton")
    for batch, expected in ((16, ways[16]), (32, ways[16]), (4, ways[16]), (128, ways[256]), (1024, ways[256])):
        assert found.way(bottleneck(batch=batch)) == expected
    assert found.way(bottleneck(batch=1)) == found.way(bottleneck(batch=4096)) == default  # a shape without an entry
    assert found.way(bottleneck(size=64, batch=256)) == ways[256]
    assert found.way(bottleneck(size=448, batch=256)) == default
    for other in ({"phase": "infer"}, {"dtype": "float16"}, {"kind": "basic"}, {"stride": 2}, {"groups": 32}):
        assert found.way(bottleneck(**other)) == default
    assert [batch_class(batch) for batch in (1, 2, 3, 6, 48, 100, 256, 300)] == [1, 2, 4, 8, 64, 128, 256, 256]


def test_a_gpu_where_no_way_was_right_stays_unfused() -> None:
    found = table({bottleneck(): UNFUSED}, "triton")
    for other in ({}, {"phase": "infer"}, {"dtype": "float32"}, {"size": 448}):
        assert found.way(bottleneck(**other)) == UNFUSED
    assert table({bottleneck(): UNFUSED}, "cpu").way(bottleneck(phase="infer")) == Way("cpu")  # verified kernels


# No table


def test_without_a_table_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    read = []
    monkeypatch.setattr(store, "load", lambda device: read.append(device))
    for name in ("way", "dtype_name"):
        monkeypatch.setattr(dispatch, name, None)  # a call would raise
    with expect_paths(fused_forward=3):
        for _ in range(3):
            twin(x)
    assert read == [CPU]


def test_what_nothing_was_measured_on_stays_unfused_and_the_report_says_so(fresh: None) -> None:
    cuda = torch.device("cuda", 0)
    with following(None, cuda), fusedres.use_backend("auto"):
        assert backends.backend_for(cuda) is None
    with following(table(backend="triton"), cuda), fusedres.use_backend("auto"):
        assert backends.backend_for(cuda) == "triton"
    model = fusedres.fuse(ResNet(BasicBlock, [1, 1, 1, 1])).to("meta")
    reason = fusedres.report(model)[0].reason
    assert reason == "nothing was measured on meta devices: select a backend with use_backend"


# Tile sizes


@pytest.mark.skipif(not backends._INTERPRETED, reason="the table is installed for the interpreter's device")
def test_tile_sizes_are_those_of_the_table() -> None:
    from fusedres.kernels.gram.triton import gram
    from fusedres.kernels.triton_core import launch

    x = torch.randn(2, 80, 3, 3, device="meta").contiguous(memory_format=torch.channels_last)

    def pivot() -> launch.Launch:
        with launch.record_launches() as launches:
            gram(x, None, 1)
        return next(found for found in launches if found.name == "gram_pivot_kernel")

    first, second = pivot().candidates[:2]
    assert pivot().config == first
    key = "gram_pivot float32 80"
    with following(table(configs={key: second.label})):
        assert pivot().config == second
        with launch.choosing(lambda problem, candidates: None):
            assert pivot().config == first
    with following(table(configs={key: "BLOCK_C=7 w1 s1"})):
        assert pivot().config == first


@pytest.mark.parametrize("which", [0, -1])
def test_fakes_follow_the_chosen_tiles(which: int) -> None:
    """torch.compile expects the sizes of partial sums that the kernels return."""
    from fusedres.kernels.conv_dgrad.triton import conv_dgrad
    from fusedres.kernels.conv_fprop.triton import conv_fprop
    from fusedres.kernels.triton_core import launch

    x = torch.empty(64, 128, 28, 28, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    weight = torch.empty(128, 128, 3, 3, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    state = torch.empty(4, 128, device="meta")
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    fprop = (Raw(x, None), weight, geometry, True)
    dgrad = (Gradient(x), weight, list(x.shape), geometry, Raw(x, state))
    with launch.choosing(lambda problem, candidates: candidates[which]):
        for op, kernel, arguments in ((ops.conv_fprop, conv_fprop, fprop), (ops.conv_dgrad, conv_dgrad, dgrad)):
            fake = op(*arguments, backend="triton")
            assert [t.shape for t in fake] == [t.shape for t in kernel(*arguments)]


@pytest.mark.skipif(not backends._INTERPRETED, reason="the table is installed for the interpreter's device")
def test_code_compiled_for_open_sizes_takes_tiles_of_a_table() -> None:
    torch._dynamo.reset()
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fusedres.fuse(copy.deepcopy(block), conv="fused")
    compiled = torch.compile(twin, backend="aot_eager", dynamic=True)
    with following(table({}, "triton", {"x": "y"})), fusedres.use_backend("triton"):
        torch.testing.assert_close(compiled(x), block(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_tf32_has_choices_of_its_own() -> None:
    from fusedres.kernels.triton_core import launch

    asked, convolutions = [], torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        with launch.choosing(lambda problem, candidates: asked.append(launch.problem_key(problem))):
            for convolutions.fp32_precision in ("ieee", "tf32"):
                launch.choose((launch.Config({}),), "gram", torch.float32, 8)
    finally:
        convolutions.fp32_precision = before
    assert asked == ["gram float32 8", "gram tf32 8"]
