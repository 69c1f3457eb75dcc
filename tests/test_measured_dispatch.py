"""What auto follows: a table's choices are taken where they apply, and tables that do not fit are told and ignored."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion import expect_paths, fused_twin, stock_case
from op_inputs import device as device_of
from reference import run
from shapes import Case, case
from test_blocks import prepared
from tolerance import check
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import fusedres
from fusedres import backends, dispatch
from fusedres.autograd import UNIT_TENSORS
from fusedres.dispatch import LIBRARY, UNFUSED, Directions, Entry, Shape, Table, Way, store
from fusedres.dispatch.table import as_json, batch_class, parse
from fusedres.modules import choice

CPU = torch.device("cpu")
HERE = store.family(CPU)
OWN = Directions(True, True, True)
FPROP = Directions(True, False, False)
BOTTLENECK = case("bottleneck", "projection", planes=8, batch=2, height=6, width=6)
BASIC = case("basic", "identity", planes=8, batch=2, height=5, width=6)


def table(blocks: dict[Shape, Way] | None = None, backend: str = "cpu", configs: dict[str, str] | None = None) -> Table:
    entries = {shape: Entry(way, 1.0) for shape, way in (blocks or {}).items()}
    return Table(HERE, backend, store.versions(), "2026-01-01", entries, configs or {})


def shape_of(block: nn.Module, x: Tensor, phase: str = "train", dtype: str = "float32") -> Shape:
    names = getattr(block, "_conv_names", ("conv1",))
    return Shape._make((*choice.shape_of(block, names, x), batch_class(x.shape[0]), dtype, phase))


@contextmanager
def following(found: Table | None, device: torch.device = CPU) -> Iterator[None]:
    before = dispatch.table(device)
    dispatch.install(device, found)
    try:
        yield
    finally:
        dispatch.install(device, before)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was read yet."""
    monkeypatch.setattr(dispatch, "_tables", {})


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fresh: None) -> Path:
    """An empty cache folder, and nothing read yet; the path of this device's table."""
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache" / store.file_name(HERE)


# The choices are taken, and the numbers stay


class Products:
    """Counts the own products that run, by their kernel's size."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.ran: Counter[tuple[str, str]] = Counter()
        launches = fusedres.autograd.conv_forward.launches(backend)
        for name, at in (("fprop", 1), ("dgrad", 4), ("wgrad", 6)):  # the weight, or its height and width
            monkeypatch.setattr(launches, f"conv_{name}", self._counting(name, getattr(launches, f"conv_{name}"), at))

    def _counting(self, name: str, kernel: Callable[..., Any], at: int) -> Callable[..., Any]:
        def counting(*args: Any) -> Any:
            size = args[at].shape[2:] if isinstance(args[at], Tensor) else args[at]
            self.ran["1x1" if tuple(size) == (1, 1) else "larger", name] += 1
            return kernel(*args)

        return counting


def matches_eager(block_case: Case, way: Way, backend: str, **paths: int) -> None:
    """Forward and backward with a table that has this way for the block."""
    block, x, grad, eager, truth = prepared(block_case, torch.float32, torch.channels_last, "train")
    twin = fused_twin(block)
    where = torch.empty(0, device=device_of(backend, torch.float32)).device  # with its index
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
    plan, tensors = twin._read(x, "cpu", Way("cpu", one_pass=one_pass))
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
    unfused = type(twin)._unfused
    four = torch.cat([x, x])
    with (
        pytest.MonkeyPatch.context() as patch,
        following(table({shape_of(twin, x): Way("cpu"), shape_of(twin, four): UNFUSED})),
    ):
        patch.setattr(type(twin), "_unfused", lambda self, x: (ran.append(len(x)), unfused(self, x))[1])
        for images in (x, four, torch.cat([four, x])):
            torch.testing.assert_close(compiled(images), block(images), rtol=1e-4, atol=1e-4)
    assert ran == ([] if dynamic else [4, 6])  # six images are nearer to four
    torch._dynamo.reset()


# Whoever is explicit wins


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
            plan, _ = twin._read(x, "reference", way)
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
                way = choice.measured_way(twin, twin._conv_names, x, served, "auto", "auto")
                plan, _ = twin._read(x, way.backend if way else served, way)
            assert plan.units[0].own == own


def test_a_frozen_block_stays_frozen() -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last, mode="eval")
    twin = fusedres.freeze(fused_twin(block))
    with following(table({shape_of(twin, x, "infer"): UNFUSED})), expect_paths(frozen_forward=1), torch.no_grad():
        twin(x)


# Shapes without an entry


def bottleneck(size: int = 56, batch: int = 64, **more: object) -> Shape:
    return Shape("bottleneck", "identity", 256, 64, 256, 1, 1, 1, size, size, batch, "bfloat16", "train")._replace(
        **more
    )


def test_the_nearest_batch_then_the_nearest_sizes_then_the_librarys_convolutions() -> None:
    ways = {batch: Way("triton", Directions(True, False, batch == 16)) for batch in (16, 256)}
    found = table({bottleneck(batch=batch): way for batch, way in ways.items()}, "triton")
    assert (
        found.way(bottleneck(batch=16)) == found.way(bottleneck(batch=32)) == found.way(bottleneck(batch=1)) == ways[16]
    )
    assert found.way(bottleneck(batch=128)) == found.way(bottleneck(batch=4096)) == ways[256]
    assert found.way(bottleneck(size=64, batch=256)) == ways[256]
    default = Way("triton")
    assert found.way(bottleneck(size=448, batch=256)) == default
    for other in ({"phase": "infer"}, {"dtype": "float16"}, {"kind": "basic"}, {"stride": 2}, {"groups": 32}):
        assert found.way(bottleneck(**other)) == default
    assert [batch_class(batch) for batch in (1, 2, 3, 6, 48, 100, 256, 300)] == [1, 2, 4, 8, 64, 128, 256, 256]


# No table


def test_without_a_table_nothing_is_asked(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    read = []
    monkeypatch.setattr(store, "load", lambda device: read.append(device))
    for name in ("way", "dtype_name"):
        monkeypatch.setattr(dispatch, name, None)  # calling it raises
    with expect_paths(fused_forward=3):
        for _ in range(3):
            twin(x)
    assert read == [CPU]


def test_gpus_without_a_table_stay_unfused_and_the_report_says_what_to_do(fresh: None) -> None:
    cuda = torch.device("cuda", 0)
    with following(None, cuda), fusedres.use_backend("auto"):
        assert backends.backend_for(cuda) is None
    with following(table(backend="triton"), cuda), fusedres.use_backend("auto"):
        assert backends.backend_for(cuda) == "triton"
    model = fusedres.fuse(ResNet(BasicBlock, [1, 1, 1, 1])).to("meta")
    reason = fusedres.report(model)[0].reason
    assert "python -m fusedres tune" in reason and "use_backend" in reason


# Tile sizes


@pytest.mark.skipif(not backends._INTERPRETED, reason="the table is installed for the interpreter's device")
def test_tile_sizes_are_those_of_the_table() -> None:
    from fusedres.kernels import launch
    from fusedres.kernels.gram.triton import gram

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


# Files


def written(path: Path, found: Table) -> None:
    store.update(path, found)


def test_the_users_table_is_read_once_and_goes_before_the_packages(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged = tmp_path / "packaged"
    monkeypatch.setattr(store, "PACKAGED", packaged)
    a, b, c = (bottleneck(batch=batch) for batch in (16, 64, 256))
    old = replace(table({a: Way("triton"), b: Way("triton")}, "triton", {"x": "1", "y": "1"}), versions={"torch": "0"})
    written(packaged / cache.name, old)
    assert set(store.load(CPU).blocks) == {a, b}  # whatever versions the package's was measured with
    written(cache, table({b: UNFUSED, c: Way("cpu")}, "cpu", {"y": "2"}))
    found = dispatch.table(CPU)
    assert {shape: entry.way for shape, entry in found.blocks.items()} == {a: Way("triton"), b: UNFUSED, c: Way("cpu")}
    assert (found.backend, found.configs) == ("cpu", {"x": "1", "y": "2"})
    cache.unlink()
    assert dispatch.table(CPU) is found


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRES_CACHE_DIR", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert store.cache_folder() == Path("/a")
    monkeypatch.delenv("FUSEDRES_CACHE_DIR")
    assert store.cache_folder() == Path("/b/fusedres")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert store.cache_folder() == Path("/c/.cache/fusedres")


GOOD = as_json(table({bottleneck(): Way("cpu", FPROP, one_pass=True)}))
BLOCK = GOOD["blocks"][0]
BROKEN = {
    "cut": json.dumps(GOOD)[:-40],
    "empty": "",
    "binary": b"\xff\xfe\x00",
    "a list": "[1]",
    "an older format": json.dumps(GOOD | {"format": 0}),
    "another device": json.dumps(GOOD | {"device": "NVIDIA H100 80GB HBM3, sm_90"}),
    "other versions": json.dumps(GOOD | {"versions": {"torch": "1.0"}}),
    "no entries": json.dumps({key: value for key, value in GOOD.items() if key != "blocks"}),
    "a size that is none": json.dumps(GOOD | {"blocks": [BLOCK | {"height": 0}]}),
    "a way that is none": json.dumps(GOOD | {"blocks": [BLOCK | {"way": "fast"}]}),
    "an unknown backend": json.dumps(GOOD | {"blocks": [BLOCK | {"way": BLOCK["way"] | {"backend": "metal"}}]}),
    "an unknown product": json.dumps(GOOD | {"blocks": [BLOCK | {"way": BLOCK["way"] | {"1x1": ["bprop"]}}]}),
    "configs that are none": json.dumps(GOOD | {"configs": ["a"]}),
}


def test_a_good_file_is_silent(cache: Path) -> None:
    cache.write_text(json.dumps(GOOD))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert as_json(dispatch.table(CPU)) == GOOD == as_json(parse(json.loads(cache.read_text()), HERE))


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_used_is_told_once_and_ignored(cache: Path, content: str | bytes) -> None:
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    block, x, _ = stock_case(BASIC, memory_format=torch.channels_last)
    twin = fused_twin(block)
    with warnings.catch_warnings(record=True) as caught, expect_paths(fused_forward=2):
        warnings.simplefilter("always")
        twin(x)
        twin(x)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(cache) in message and "python -m fusedres tune" in message and "is ignored" in message


def test_a_table_that_needs_triton_is_told_where_there_is_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    written(cache, table({bottleneck(): Way("cpu")}))
    assert store.load(CPU) is not None
    written(cache, table({bottleneck(batch=16): Way("triton")}))
    with pytest.warns(UserWarning, match="it needs Triton"):
        assert store.load(CPU) is None


def test_a_folder_in_its_place_is_told(cache: Path) -> None:
    cache.mkdir()
    with pytest.warns(UserWarning, match="is ignored"):
        assert dispatch.table(CPU) is None


def test_writing_keeps_what_others_wrote_of_the_same_versions(cache: Path) -> None:
    a, b = bottleneck(batch=16), bottleneck(batch=64)
    written(cache, replace(table({a: UNFUSED}), versions={"torch": "0"}))
    written(cache, table({b: Way("cpu")}, configs={"x": "1"}))
    assert set(store.read(cache, HERE).blocks) == {b}
    written(cache, table({a: Way("cpu")}))
    written(cache, table({b: UNFUSED}))
    found = store.read(cache, HERE)
    assert {shape: entry.way for shape, entry in found.blocks.items()} == {a: Way("cpu"), b: UNFUSED}
    assert found.configs == {"x": "1"}
    cache.write_text("broken")
    with pytest.warns(UserWarning, match="is ignored"):
        written(cache, table({a: UNFUSED}))
    assert set(store.read(cache, HERE).blocks) == {a}


def _write_some(path: Path, offset: int, start: object) -> None:
    start.wait()
    for batch in range(20):
        store.update(path, table({bottleneck(batch=1 << batch, in_channels=offset): Way("cpu")}))


def test_two_processes_at_once_both_end_in_the_file(cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    writers = [context.Process(target=_write_some, args=(cache, offset, start)) for offset in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    found = store.read(cache, HERE)
    assert Counter(shape.in_channels for shape in found.blocks) == {1: 20, 2: 20}


def _die_writing(path: Path, at: str) -> None:
    setattr(os, at, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    store.update(path, table({bottleneck(): UNFUSED}))


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_kill_while_writing_leaves_the_old_file_whole(cache: Path, at: str) -> None:
    written(cache, table({bottleneck(): Way("cpu")}))
    before = cache.read_bytes()
    process = multiprocessing.get_context("fork").Process(target=_die_writing, args=(cache, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert cache.read_bytes() == before
    written(cache, table({bottleneck(batch=16): UNFUSED}))  # neither the lock nor the rest is in the way
    assert len(store.read(cache, HERE).blocks) == 2


def test_devices_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.file_name("NVIDIA H100 80GB HBM3, sm_90") == "nvidia-h100-80gb-hbm3-sm-90.json"
    assert store.family(torch.device("meta")) is None
    torch.set_num_threads(1)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    one = store.family(CPU)
    torch.set_num_threads(2)
    assert one.endswith("1 threads") and store.family(CPU).endswith("2 threads")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "interpreted" in store.family(CPU)


def test_the_tests_never_read_or_write_the_users_cache() -> None:
    assert os.environ["FUSEDRES_CACHE_DIR"] == "/dev/null/no-cache"
    with pytest.raises(NotADirectoryError):
        store.update(store.cache_folder() / "x.json", table())
