"""The benchmarks: their statistics, their byte counts; that they run, refuse wrong results and write what they say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedres

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _setting():
    """The scripts' folder on the path, and one thread: nothing here is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def harness():
    import harness

    return harness


@pytest.fixture(scope="module")
def traffic():
    import traffic

    return traffic


@pytest.fixture(scope="module")
def blocks():
    import blocks

    return blocks


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=BENCHMARKS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


# --- statistics -------------------------------------------------------------------------------------------------------


def test_summary_interpolates_percentiles(harness):
    s = harness.summarize([5.0, 1.0, 4.0, 2.0, 3.0, 6.0])
    assert (s.median, s.p20, s.p80, s.rounds) == pytest.approx((3.5, 2.0, 5.0, 6))
    with pytest.raises(ValueError, match="at least one sample"):
        harness.summarize([])


def test_ratio_is_taken_within_rounds(harness):
    # The machine slows down threefold half way; within each round `fast` takes two thirds of `slow`.
    slow = [3.0] * 10 + [9.0] * 10
    fast = [2.0] * 10 + [6.0] * 10
    interval = harness.ratio_interval(slow, fast)
    assert (interval.median, interval.low, interval.high) == pytest.approx((1.5, 1.5, 1.5))
    with pytest.raises(ValueError, match="same rounds"):
        harness.ratio_interval(slow, fast[:-1])


def test_ratio_interval_covers_the_truth(harness):
    """Of 200 experiments with a true median ratio of 1.25, a 95% interval holds it in about 95%."""
    source = torch.Generator().manual_seed(0)
    covered = 0
    for experiment in range(200):
        slow = 1.25 * torch.exp(0.2 * torch.randn(30, generator=source))
        fast = torch.exp(0.2 * torch.randn(30, generator=source))
        interval = harness.ratio_interval(slow.tolist(), fast.tolist(), resamples=400, seed=experiment)
        assert interval.low <= interval.median <= interval.high
        covered += interval.low <= 1.25 <= interval.high
    assert 180 <= covered <= 199


def test_removed_share(harness):
    interval = harness.removed_interval([10.0, 20.0, 30.0], [8.0, 16.0, 24.0], [5.0, 10.0, 15.0])
    assert (interval.median, interval.low, interval.high) == pytest.approx((40, 40, 40))
    nothing = harness.removed_interval([10.0, 10.0], [8.0, 8.0], [11.0, 12.0])
    assert math.isnan(nothing.median)


def test_interleaving_rotates_and_times_every_variant_once_a_round(harness):
    order: list[str] = []
    variants = [harness.Variant(n, lambda n=n: order.append(n)) for n in "abc"]
    timer = harness.Timer(torch.device("cpu"), least=0.0)
    samples = harness.interleave(variants, timer, rounds=6, warmup=1)
    assert {n: len(s) for n, s in samples.items()} == {"a": 6, "b": 6, "c": 6}
    assert order[:3] == ["a", "b", "c"]  # warm-up
    rounds = ["".join(order[3 + 3 * k : 6 + 3 * k]) for k in range(6)]
    assert rounds == ["abc", "bca", "cab", "cba", "acb", "bac"]


def test_timer_measures_the_run_and_not_the_cleanup(harness, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def spend(seconds: float) -> None:
        now[0] += seconds

    variant = harness.Variant("v", lambda: spend(0.002), lambda: spend(5.0))
    timer = harness.Timer(torch.device("cpu"))
    assert timer.sample(variant, 3) == pytest.approx(0.002)
    assert timer.calls(variant, 0.0002) == 5
    # A budget ends the rounds, but not before the least number of them.
    assert len(harness.interleave([variant], timer, rounds=50, at_least=7, budget=1.0)["v"]) == 7
    assert len(harness.interleave([variant], timer, rounds=50, at_least=1, budget=60.0)["v"]) in range(8, 13)


def test_kept_pages_are_not_faulted_again():
    code = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import harness, torch
if not harness.keep_pages():
    sys.exit(77)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(25 << 20).fill_(1)  # 100 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)), faults())
"""
    command = [sys.executable, "-c", code, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    assert max(map(int, done.stdout.split())) < 1000  # 25,600 pages of 4 KiB otherwise


def test_saved_bytes_counts_storages_once(harness):
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, 16, requires_grad=True)

    def run() -> torch.Tensor:
        y = x @ w  # saves x and w
        z = y.sigmoid()  # saves z
        return z[:4] * z[4:]  # saves two views of z

    assert harness.saved_bytes(run) == 4 * (8 * 16 + 16 * 16 + 8 * 16)
    assert harness.saved_bytes(run, [x, w]) == 4 * 8 * 16


def test_rows_have_all_keys_and_no_others(harness, tmp_path):
    where = harness.machine(torch.device("cpu"))
    row = harness.row(where, harness.Summary(2.0, 1.0, 3.0, 9), counted_bytes=10, floor_bytes=4, copy_bytes_per_s=8.0)
    assert tuple(row) == harness.ROW_KEYS
    assert (row["bytes_per_s"], row["percent_of_floor"]) == (5.0, 25.0)
    with pytest.raises(ValueError, match="unknown fields"):
        harness.row(where, harness.Summary(2.0, 1.0, 3.0, 9), sped=1)
    harness.write_rows(tmp_path / "rows.json", [row, row | {"ratio": {"median": math.nan}}])
    assert json.loads((tmp_path / "rows.json").read_text())[1]["ratio"] == {"median": None}
    with pytest.raises(ValueError, match="missing or unknown"):
        harness.write_rows(tmp_path / "rows.json", [{"op": "x"}])


# --- bytes ------------------------------------------------------------------------------------------------------------


def test_closed_form_of_a_basic_block_by_hand(traffic):
    """Identity BasicBlock: all tensors have the same size u. Counted from the list of operators, by hand."""
    block = traffic.Block("basic", 16, 16, 8)
    u, mask = 2 * 16 * 8 * 8, 16 * 8 * 8 / 8
    expected = {
        # 2 conv (2), 2 bn (1 + 2), relu 2, add 3, relu 2 | relu 3, 2 bn (2 + 3), relu 3, 2 (dgrad 2 + wgrad 2), sum 3
        "eager": (4 + 6 + 2 + 3 + 2) * u + (3 + 10 + 3 + 8 + 3) * u,
        # conv 2, statistics 1, apply 2, conv 2, statistics 1, tail 3 | with out as mask: 3 + 4, inner 2 + 3, conv 8, 4
        "pointwise": 11 * u + (7 + 5 + 8 + 4) * u,
        # the mask in bits: written once, read by sums, elementwise and the gradients' sum
        "library": 11 * u + mask + (2 + 3 + 5 + 8 + 3) * u + 3 * mask,
        # x>y1, y1>y2, y2+x>out | sums g y2; dgrad g y2 y1>dz; wgrad g y2 y1; wgrad dz y1 x; dgrad dz y1 g>dx
        "epilogue": (2 + 2 + 3) * u + mask + (2 + 4 + 3 + 3 + 4) * u + 4 * mask,
        # no 1x1 convolution: as before
        "one_pass": (2 + 2 + 3) * u + mask + (2 + 4 + 3 + 3 + 4) * u + 4 * mask,
        # sums g y2; g y2>dy2; dgrad dy2 y1>dz; wgrad dy2 y1; dz y1>dy1; wgrad dy1 x; dgrad dy1 g>dx
        "stored_dy": 7 * u + mask + (2 + 3 + 3 + 2 + 3 + 2 + 3) * u + 3 * mask,
    }
    assert {m: traffic.bytes_moved(block, m, "train", 1, 2, weights=False) for m in traffic.MODES} == expected
    # Weights: each convolution forward, dgrad, wgrad; in any mode.
    for mode in traffic.MODES:
        with_weights = traffic.bytes_moved(block, mode, "train", 3, 2)
        assert with_weights == 3 * expected[mode] + 2 * 3 * 2 * 16 * 16 * 9


def test_closed_form_of_a_strided_bottleneck_by_hand(traffic):
    """x: 32 channels at 8², conv1 to 16 at 8², conv2 to 16 at 4², out 64 at 4²; in units of v = 16 channels at 4²."""
    block = traffic.Block("bottleneck", 32, 16, 8, 2, "projection")
    v, mask = 4 * 16 * 4 * 4, 64 * 4 * 4 / 8
    x, touched, y1, y2, out = 8, 2, 4, 1, 4
    eager = (
        (x + y1) + 3 * y1 + 2 * y1 + (y1 + y2) + 3 * y2 + 2 * y2 + (y2 + out) + 3 * out  # the branch
        + (touched + out) + 3 * out + 3 * out + 2 * out  # projection, its BatchNorm, add, relu
        + 3 * out + 5 * out + 2 * (out + y2) + 3 * y2 + 5 * y2 + 2 * (y2 + y1) + 3 * y1 + 5 * y1 + 2 * (y1 + x)
        + 5 * out + (out + x) + (out + touched) + 3 * x
    )  # fmt: skip
    one_pass = (
        (x + y1) + (y1 + y2) + y2 + touched + (y2 + touched + out)  # conv1, conv2, two Gram matrices, tail
        + (out + y2 + touched) + (out + y2 + y2)  # sums and Gᵀ; dz2
        + (2 * y2 + 2 * y1) + (2 * y2 + y1)  # conv2: dz2, y2, y1 > dz1; dz2, y2, y1
        + (2 * y1 + x)  # conv1 wgrad
        + (out + touched + touched)  # projection's gradient at the pixels it touches
        + (2 * y1 + touched + x)  # conv1 dgrad, which adds it
    )  # fmt: skip
    assert traffic.bytes_moved(block, "eager", "train", 1, 4, weights=False) == eager * v
    assert traffic.bytes_moved(block, "one_pass", "train", 1, 4, weights=False) == one_pass * v + 4 * mask


def test_closed_form_inference_by_hand(traffic):
    block = traffic.Block("bottleneck", 64, 16, 8)
    u = 4 * 16 * 8 * 8
    moved = {m: traffic.bytes_moved(block, m, "infer", 2, 4, weights=False) / (2 * u) for m in traffic.MODES}
    # conv 5 + 2 + 5, bn 2 + 2 + 8, relu 2 + 2, add 12, relu 8
    assert moved["eager"] == 48
    assert moved["pointwise"] == moved["library"] == 12 + 2 + 2 + 12
    assert moved["epilogue"] == moved["one_pass"] == moved["stored_dy"] == 5 + 2 + (1 + 4 + 4)


def test_closed_form_of_a_stem_by_hand(traffic):
    """Images of 3 channels at 8², y 64 channels at 4², pooled 64 at 2²; one byte an index fused, eight in eager."""
    stem = traffic.Stem(8)
    x, y, out, places = 4 * 3 * 64, 4 * 64 * 16, 4 * 64 * 4, 64 * 4
    train = {m: traffic.bytes_moved(stem, m, "train", 1, 4, weights=False) for m in ("eager", "stored_dy")}
    # conv, statistics 1 + apply 2, relu 2, pool | pool, relu 3, bn 2 + 3, wgrad
    assert train["eager"] == (x + y) + 5 * y + (y + out + 8 * places) + (out + 8 * places + y) + 8 * y + (y + x)
    # conv with statistics, one pass behind it | sums, wgrad, each from y and what the pool kept
    assert train["stored_dy"] == (x + y) + (y + out + places) + 2 * (out + places + y) + x
    infer = {m: traffic.bytes_moved(stem, m, "infer", 3, 4) for m in ("eager", "library")}
    weights = 4 * 64 * 3 * 49
    assert infer["eager"] == 3 * ((x + y) + 4 * y + (y + out + 8 * places)) + weights
    assert infer["library"] == 3 * ((x + y) + (y + out)) + weights
    assert traffic.flops(stem, "train", 2) == 2 * traffic.flops(stem, "infer", 2) == 2 * 2 * 2 * 64 * 16 * 3 * 49


def test_resnet_totals(traffic):
    """MB an image at 224² in 16 bits; every step of fusion moves less."""
    rows = {r["mode"]: r for r in traffic.table()}
    assert len(traffic.resnet_blocks(50)) == 16
    assert rows["eager"]["resnet18"] == pytest.approx(73.3, abs=0.05)
    assert rows["eager"]["resnet50"] == pytest.approx(440.6, abs=0.05)
    for depth in ("resnet18", "resnet34", "resnet50"):
        totals = [rows[m][depth] for m in ("eager", "pointwise", "library", "epilogue", "one_pass")]
        assert totals == sorted(totals, reverse=True)
        assert rows["one_pass"][depth] < rows["stored_dy"][depth] < rows["library"][depth]
    assert traffic.stem_bytes(fused=False) / traffic.stem_bytes(fused=True) > 3


def test_shapes_are_torchvisions(traffic):
    """Block names, sizes and convolutions are those that run inside torchvision's models."""
    from torchvision.models import resnet18, resnet50

    def shape(channels: int, size: int) -> torch.Size:
        return torch.Size((1, channels, size, size))

    for depth, build in ((18, resnet18), (50, resnet50)):
        with torch.device("meta"):
            model, images = build(), torch.empty(1, 3, 224, 224)
        seen: dict[nn.Module, tuple[torch.Size, torch.Size]] = {}
        hook = partial(_remember, seen)
        for module in model.modules():
            module.register_forward_hook(hook)
        model(images)
        blocks = traffic.resnet_blocks(depth)
        in_model = {n for n, m in model.named_modules() if hasattr(m, "downsample")}
        assert blocks.keys() == in_model
        for name, block in blocks.items():
            module = model.get_submodule(name)
            ends = (shape(block.in_channels, block.size), shape(block.out_channels, block.out_size))
            assert seen[module] == ends, name
            convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
            for conv, c in zip(convs, block.convolutions, strict=True):
                assert seen[conv] == (shape(c.in_channels, c.in_size), shape(c.out_channels, c.out_size)), name
                assert conv.weight.numel() == c.weight, name


def _remember(seen: dict, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    seen[module] = (inputs[0].shape, output.shape)


def test_counting_by_hand(traffic):
    a, b = torch.randn(10, 20), torch.randn(10, 20)
    with traffic.CountBytes() as count:
        c = a + b  # reads 2, writes 1
        c.t().view(20, 10)  # views
        torch.empty(1000)  # nothing is touched
        c.relu_()  # reads and writes 1
        c.copy_(a)  # reads 1, writes 1
        torch.add(a, a)  # one argument: reads 1, writes 1
        c.zero_()  # writes 1
        a.expand(3, 10, 20).sum()  # reads 1 and not 3
    unit = 4 * 200
    assert (count.read, count.written) == ((2 + 1 + 1 + 1 + 1) * unit, (1 + 1 + 1 + 1 + 1) * unit + 4)
    assert next(iter(count.by_operator())) == "aten::add"


def test_counting_passes_of_batch_norm_and_convolution(traffic):
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    with traffic.CountBytes() as count:
        out = F.batch_norm(x, torch.zeros(8), torch.ones(8), weight, torch.zeros(8), training=True)
    activations = x.numel() * 4
    # x twice, result once, and per channel: weight, bias, running mean and variance, mean and invstd
    assert activations * 3 <= count.total <= activations * 3 + 10 * 8 * 4
    with traffic.CountBytes() as count:
        out.backward(torch.ones_like(x))
    ones = activations
    assert activations * 5 <= count.total - ones <= activations * 5 + 10 * 8 * 4


@pytest.mark.parametrize("name", ["tiny.basic", "tiny.bottleneck"])
def test_counted_bytes_of_eager_agree_with_the_closed_form(traffic, blocks, name):
    """Two counts that share nothing: operators' arguments as run, and kernels' operand lists from the shapes."""
    block = blocks.TINY[name]
    module, batch = blocks.make_block(block).to(memory_format=torch.channels_last), 16
    x = torch.randn(batch, block.in_channels, block.size, block.size).to(memory_format=torch.channels_last)
    x.requires_grad_()
    out = module(x)
    with traffic.CountBytes() as count:
        module(x).backward(torch.ones_like(out, memory_format=torch.preserve_format))
    ones = out.numel() * 4
    expected = traffic.bytes_moved(block, "eager", "train", batch, 4)
    vectors = 4 * 8 * 30 * max(block.in_channels, block.out_channels)  # per-channel vectors, which the form leaves out
    assert expected <= count.total - ones <= expected + vectors
    assert vectors < 0.1 * expected


def test_launches_count_where_an_op_makes_some(traffic):
    """Under triton, on meta tensors, as launched.py counts; under cpu as operators."""
    import counting
    import launched

    block = traffic.Block("bottleneck", 32, 8, 8)
    module, x = launched.build(block, "fused min", 8, torch.float32)
    with fusedres.use_backend("triton"), counting.CountRun() as count:
        out = module(x)
    expected = launched.train_step(block, "fused min", 8, torch.float32)["forward"]
    assert count.total == expected.total + sum(launch.bytes() for launch in expected.kernels)
    assert {launch.name for launch in expected.kernels} <= set(count.by_operator())

    fused = fusedres.fuse(launched.make_block(block))
    x = torch.randn(out.shape)
    totals = []
    for mode in (counting.CountRun, traffic.CountBytes):
        with mode() as count:
            fused(x)
        totals.append(count.by_operator())
    assert totals[0] == totals[1] and any(name.startswith("fusedres::") for name in totals[0])


# --- equivalence ------------------------------------------------------------------------------------------------------


def bench_with(fuse, *arguments: str) -> int:
    import bench_block

    common = ["--device", "cpu", "--batch", "2", "--pairs", "1", "--phase", "train"]
    return bench_block.main([*common, *arguments], fuse=fuse)


def test_stock_in_the_other_memory_format_passes(capsys):
    assert bench_with(lambda m: m.to(memory_format=torch.contiguous_format), "--blocks", "tiny.bottleneck") == 0
    assert "tiny.bottleneck" in capsys.readouterr().out


class _WrongOutput(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.conv2, self.bn2 = (
            getattr(block, n) for n in ("conv1", "bn1", "relu", "conv2", "bn2")
        )

    def forward(self, x):
        branch = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(1.001 * branch + x)


def _wrong_gradient(module: nn.Module) -> nn.Module:
    module.bn2.weight.register_hook(lambda grad: 1.01 * grad)
    return module


def _wrong_statistics(module: nn.Module) -> nn.Module:
    module.bn1.momentum = 0.11
    return module


@pytest.mark.parametrize(
    ("fuse", "tensor"),
    [
        pytest.param(_WrongOutput, "output", id="output off by 0.1%"),
        pytest.param(_wrong_gradient, "bn2.weight grad", id="one gradient off by 1%"),
        pytest.param(_wrong_statistics, "bn1.running_mean", id="running statistics"),
    ],
)
def test_wrong_results_stop_the_benchmark(fuse, tensor, capsys):
    assert bench_with(fuse, "--blocks", "tiny.basic") == 1
    captured = capsys.readouterr()
    failures = [line for line in captured.err.splitlines() if "FAILED" in line]
    assert any(line.strip().startswith(f"{tensor}:") for line in failures)
    assert "ratio" not in captured.out  # no table of times


def test_no_relu_is_left_to_rounding(harness, blocks):
    """After clear_masks every pre-activation keeps a distance from 0 that it did not have before."""
    module = blocks.make_block(blocks.Block("bottleneck", 16, 4, 24)).double()
    x = torch.randn(8, 16, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def nearest(of: nn.Module) -> list[float]:
        found: list[float] = []
        hook = of.relu.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].abs().min().item()))
        of(x)
        hook.remove()
        return found

    before = nearest(module)
    biases = {n: p.detach().clone() for n, p in module.named_parameters() if n.startswith("bn") and n.endswith("bias")}
    harness.clear_masks(module, x)
    after = nearest(module)
    assert len(before) == len(after) == 3
    assert min(after) > 3 * max(before)
    assert min(after) > 5e-4
    for name, old in biases.items():
        assert 0 < (module.get_parameter(name) - old).abs().max() < 0.1


def test_nan_fails(harness):
    reference = torch.ones(4, dtype=torch.float64)
    broken = torch.tensor([1.0, 1.0, math.nan, 1.0])
    verdict = harness.judge("output", broken, torch.ones(4), reference, torch.float32)
    assert not verdict.passed
    assert harness.judge("output", torch.ones(4), torch.ones(4), reference, torch.float32).passed


# --- bench_ops --------------------------------------------------------------------------------------------------------


def test_bench_ops_measures_every_op(tmp_path, capsys, harness):
    import bench_ops

    path = tmp_path / "ops.json"
    small = ["--device", "cpu", "--sizes", "4", "--channels", "16", "--batch", "2", "--pairs", "2", "--fresh-pages"]
    assert bench_ops.main([*small, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    rows = json.loads(path.read_text())
    unit, mask, vectors = 4 * 2 * 16 * 4 * 4, 2 * 16 * 4 * 4 // 8, 4 * 16 * 32 + 8 * 16 * 16  # the Gram matrix
    # Tensors that each op reads and writes, and masks of one bit an element; a reduction before an elementwise pass
    # reads its operands once more.
    passes = {
        "bn_statistics": (1, 0),
        "bn_relu": (2, 0),
        "bn_add_relu identity": (3, 1),
        "bn_add_relu two branches": (3, 1),
        "bn_add_relu zero-pad": (4, 1),  # its shortcut: half of the channels, four times the pixels, counted whole
        "bn_add_relu_backward identity": (5, 2),
        "bn_add_relu_backward two branches": (8, 2),
        "bn_relu_backward_": (5, 0),
        "relu_backward": (2, 1),
        "gram": (2, 0),
        "shortcut_grad_": (3, 1),
    }
    assert {f"{r['op']} {r['variant']}".strip() for r in rows} == passes.keys()
    for r in rows:
        assert tuple(r) == harness.ROW_KEYS
        name = f"{r['op']} {r['variant']}".strip()
        assert name in out
        tensors, masks = passes[name]
        least = tensors * unit + masks * mask
        assert least <= r["counted_bytes"] <= least + vectors, name
        assert r["percent_of_floor"] == pytest.approx(100 * r["bytes_per_s"] / r["copy_bytes_per_s"])


def test_bench_ops_counts_arithmetic(tmp_path, capsys):
    """Of a Gram matrix: every pair of channels once, and the affine map and ReLU of each element."""
    import bench_ops

    path = tmp_path / "ops.json"
    small = ["--device", "cpu", "--sizes", "4", "--channels", "16", "--batch", "2", "--pairs", "1", "--fresh-pages"]
    assert bench_ops.main([*small, "--ops", "gram", "relu_backward", "--json", str(path)]) == 0
    rows = {row["op"]: row for row in json.loads(path.read_text())}
    elements = 2 * 16 * 4 * 4
    assert rows["relu_backward"]["flops"] == elements and rows["gram"]["flops"] == elements * 20
    for row in rows.values():
        assert row["flops_per_s"] == pytest.approx(row["flops"] / row["median_s"])
        bound = max(row["counted_bytes"] / row["copy_bytes_per_s"], row["flops"] / row["matmul_flops_per_s"])
        assert row["bound_s"] == pytest.approx(bound)


def test_bench_ops_refuses_a_wrong_op(monkeypatch, capsys):
    import bench_ops

    right = bench_ops.bn_relu
    wrong = lambda x, state, backend: right(x, state, backend) * (1.0 if backend == "reference" else 1.001)  # noqa: E731
    monkeypatch.setattr(bench_ops, "bn_relu", wrong)
    small = [
        "--device",
        "cpu",
        "--sizes",
        "4",
        "--channels",
        "16",
        "--batch",
        "2",
        "--pairs",
        "1",
        "--ops",
        "bn_relu",
        "--fresh-pages",
    ]
    assert bench_ops.main(small) == 1
    assert "disagrees with reference" in capsys.readouterr().err


# --- the scripts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = run_script(
        "bench_block.py", "--device", "cpu", "--batch", "1", "--pairs", "2", "--blocks", "tiny",
        "--json", str(folder / "rows.json"), "--plot", str(folder / "plot.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done, json.loads((folder / "rows.json").read_text()), folder / "plot.png"


def test_bench_block_prints_a_table_and_is_quiet_otherwise(bench_run, blocks):
    done, _, _ = bench_run
    assert done.stderr == ""  # no progress bar where nobody watches
    for name in blocks.TINY:
        assert len([line for line in done.stdout.splitlines() if line.split()[:1] == [name]]) == 2  # train, infer
    assert "ratio (95%)" in done.stdout


def test_bench_block_rows(bench_run, harness, blocks):
    _, rows, _ = bench_run
    variants = ("eager_nchw", "eager", "conv_only", "fused")
    expected = {(n, p, v) for n in blocks.TINY for p in ("train", "infer") for v in variants}
    assert {(r["name"], r["phase"], r["variant"]) for r in rows} == expected
    for r in rows:
        assert tuple(r) == harness.ROW_KEYS
        assert r["rounds"] == 2
        assert 0 < r["p20_s"] <= r["median_s"] <= r["p80_s"]
        assert r["counted_bytes"] > 0
        assert r["bytes_per_s"] == pytest.approx(r["counted_bytes"] / r["median_s"])
        assert r["percent_of_floor"] == pytest.approx(100 * r["floor_bytes"] / r["copy_bytes_per_s"] / r["median_s"])
        assert r["versions"]["torch"] == torch.__version__
        assert r["versions"]["fusedres"] == fusedres.__version__
        assert (r["backend"] is not None) == (r["variant"] == "fused")
    by_key = {(r["name"], r["phase"], r["variant"]): r for r in rows}
    for name in blocks.TINY:
        train = {v: by_key[name, "train", v] for v in ("eager", "conv_only", "fused")}
        assert train["conv_only"]["counted_bytes"] < train["fused"]["counted_bytes"] < train["eager"]["counted_bytes"]
        assert 0 < train["fused"]["saved_bytes"] < train["eager"]["saved_bytes"]
        assert train["eager"]["ratio"]["median"] == 1
        assert by_key[name, "infer", "fused"]["saved_bytes"] is None


def test_bench_block_draws_its_plot(bench_run):
    from matplotlib import image

    pixels = image.imread(bench_run[2])
    assert min(pixels.shape[:2]) > 300
    assert len({tuple(p) for p in pixels.reshape(-1, pixels.shape[2])[::97].tolist()}) > 4  # bars, not a blank page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--blocks", "resnet18.layer9.0"], "no block is called 'resnet18.layer9.0'; known: "),
        (["--memory", "none"], "memory must be one of"),
        (["--backend", "none"], "expected one of"),
        (["--pairs", "0"], "--pairs: must be at least 1, got 0"),
        (["--batch", "8", "0"], "--batch: must be at least 1, got 0"),
    ],
)
def test_bench_block_rejects_what_it_cannot_run(arguments, message, capsys):
    import bench_block

    with pytest.raises(SystemExit, match="2"):
        bench_block.main(["--device", "cpu", *arguments])
    assert message in capsys.readouterr().err


def test_bench_block_leaves_out_what_the_budget_does_not_cover(capsys):
    import bench_block

    arguments = ["--device", "cpu", "--batch", "1", "--blocks", "tiny", "--phase", "infer", "--budget", "0"]
    assert bench_block.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("tiny.") for line in lines) == 1
    assert "note: 5 lines left out, the 0 s of --budget were spent: tiny.basic.projection infer batch 1 ..." in lines


def test_bench_block_measures_frozen_inference(tmp_path):
    import bench_block

    path = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--batch", "1", "--pairs", "2", "--blocks", "tiny.basic", "--json", str(path)]
    assert bench_block.main([*arguments, "--freeze"]) == 0
    frozen = {(r["phase"], r["variant"]): r["frozen"] for r in json.loads(path.read_text())}
    assert (frozen["infer", "fused"], frozen["train", "fused"], frozen["infer", "eager"]) == (True, False, None)


def test_bench_block_compares_torch_compile(tmp_path, monkeypatch):
    """With the compiler replaced by the identity: its column, its rows, and none of its bytes are made up."""
    import bench_block

    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(module) or module)
    path = tmp_path / "rows.json"
    small = ["--device", "cpu", "--batch", "1", "--pairs", "2", "--blocks", "tiny.basic", "--phase", "infer"]
    assert bench_block.main([*small, "--compile", "--json", str(path)]) == 0
    assert len(compiled) == 1
    rows = {r["variant"]: r for r in json.loads(path.read_text())}
    assert rows["compile"]["median_s"] > 0
    assert rows["compile"]["counted_bytes"] is None


def test_bench_model_measures_whole_networks(tmp_path, capsys, harness):
    import bench_model

    path = tmp_path / "models.json"
    small = ["--device", "cpu", "--models", "resnet18", "--batch", "2", "--size", "32", "--rounds", "1"]
    assert bench_model.main([*small, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())
    assert {(r["phase"], r["variant"]) for r in rows} == {
        (phase, way) for phase in ("train", "infer") for way in ("eager", "eager_nchw", "library", "library min")
    }
    out = capsys.readouterr().out
    for r in rows:
        assert tuple(r) == harness.ROW_KEYS and r["op"] == "model" and r["variant"] in out
        assert r["images_per_s"] == pytest.approx(2 / r["median_s"]) and r["percent_of_bound"] > 0
    saved = {r["variant"]: r["saved_bytes"] for r in rows if r["phase"] == "train"}
    assert saved["library"] < 0.75 * saved["eager"]
    with pytest.raises(SystemExit, match="2"):
        bench_model.main(["--device", "cpu", "--size", "16"])
    assert "--size: must be at least 32, got 16" in capsys.readouterr().err


def test_traffic_prints_the_table(traffic, capsys):
    traffic.main([])
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["eager"] == ["73.3", "128.5", "440.6"]
    traffic.main(["--block", "18:layer2.0"])
    out = capsys.readouterr().out
    assert all(f"\n{mode}: " in f"\n{out}" for mode in traffic.MODES)
    assert "projection wgrad: dy, x -> reduced" in out
