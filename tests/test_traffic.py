"""benchmarks/traffic.py and memory_traffic/: bytes by closed formulas, and counted while operators run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fusedres
from fusedres import ops, values

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


pytestmark = pytest.mark.usefixtures("benchmark_scripts")


@pytest.fixture(scope="module")
def traffic():
    from memory_traffic import closed_form

    return closed_form


@pytest.fixture(scope="module")
def counting():
    from memory_traffic import counting

    return counting


@pytest.fixture(scope="module")
def blocks():
    from common import blocks

    return blocks


def test_closed_form_of_a_basic_block_by_hand(traffic):
    """In an identity BasicBlock all tensors have the same size u. The bytes were counted by hand from the operators."""
    block = traffic.Block("basic", 16, 16, 8)
    u, mask = 2 * 16 * 8 * 8, 16 * 8 * 8 / 8
    expected = {
        # 2 conv (2), 2 bn (1 + 2), relu 2, add 3, relu 2 | relu 3, 2 bn (2 + 3), relu 3, 2 (dgrad 2 + wgrad 2), sum 3
        "eager": (4 + 6 + 2 + 3 + 2) * u + (3 + 10 + 3 + 8 + 3) * u,
        # conv 2, statistics 1, apply 2, conv 2, statistics 1, tail 3 | with out as mask: 3 + 4, inner 2 + 3, conv 8, 4
        "pointwise": 11 * u + (7 + 5 + 8 + 4) * u,
        # mask of one bit per element: written once; read by the sums, the elementwise pass and the sum of gradients
        "library": 11 * u + mask + (2 + 3 + 5 + 8 + 3) * u + 3 * mask,
        # x>y1, y1>y2, y2+x>out | sums g y2; dgrad g y2 y1>dz; wgrad g y2 y1; wgrad dz y1 x; dgrad dz y1 g>dx
        "epilogue": (2 + 2 + 3) * u + mask + (2 + 4 + 3 + 3 + 4) * u + 4 * mask,
        # there is no 1x1 convolution, so nothing changes
        "one_pass": (2 + 2 + 3) * u + mask + (2 + 4 + 3 + 3 + 4) * u + 4 * mask,
        # sums g y2; g y2>dy2; dgrad dy2 y1>dz; wgrad dy2 y1; dz y1>dy1; wgrad dy1 x; dgrad dy1 g>dx
        "stored_dy": 7 * u + mask + (2 + 3 + 3 + 2 + 3 + 2 + 3) * u + 3 * mask,
    }
    assert {m: traffic.bytes_moved(block, m, "train", 1, 2, weights=False) for m in traffic.MODES} == expected
    # Weights: each convolution takes them in forward, dgrad and wgrad, in any mode.
    for mode in traffic.MODES:
        with_weights = traffic.bytes_moved(block, mode, "train", 3, 2)
        assert with_weights == 3 * expected[mode] + 2 * 3 * 2 * 16 * 16 * 9


def test_closed_form_of_a_strided_bottleneck_by_hand(traffic):
    """x has 32 channels at 8², y1 16 at 8², y2 16 at 4², out 64 at 4²; the unit is v = 16 channels at 4²."""
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
        + (out + touched + touched)  # the projection's gradient at the pixels that it uses
        + (2 * y1 + touched + x)  # conv1 dgrad, which adds that gradient
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
    """Images have 3 channels at 8², y 64 at 4², pooled 64 at 2²; an index takes one byte fused, and eight in eager."""
    stem = traffic.Stem(8)
    x, y, out, places = 4 * 3 * 64, 4 * 64 * 16, 4 * 64 * 4, 64 * 4
    train = {m: traffic.bytes_moved(stem, m, "train", 1, 4, weights=False) for m in ("eager", "stored_dy")}
    # conv, statistics 1 + apply 2, relu 2, pool | pool, relu 3, bn 2 + 3, wgrad
    assert train["eager"] == (x + y) + 5 * y + (y + out + 8 * places) + (out + 8 * places + y) + 8 * y + (y + x)
    # conv with statistics, one pass after it | sums and wgrad, each from y, grad and the pool's places
    assert train["stored_dy"] == (x + y) + (y + out + places) + 2 * (out + places + y) + x
    infer = {m: traffic.bytes_moved(stem, m, "infer", 3, 4) for m in ("eager", "library")}
    weights = 4 * 64 * 3 * 49
    assert infer["eager"] == 3 * ((x + y) + 4 * y + (y + out + 8 * places)) + weights
    assert infer["library"] == 3 * ((x + y) + (y + out)) + weights
    assert traffic.flops(stem, "train", 2) == 2 * traffic.flops(stem, "infer", 2) == 2 * 2 * 2 * 64 * 16 * 3 * 49


def test_resnet_totals(traffic):
    """These are MB per image at 224² in 16 bits; every step of fusion moves less."""
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
    """Block names, sizes and convolutions are those of torchvision's models."""
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


def test_counting_by_hand(counting):
    a, b = torch.randn(10, 20), torch.randn(10, 20)
    with counting.CountBytes() as count:
        c = a + b  # reads 2, writes 1
        c.t().view(20, 10)  # views
        torch.empty(1000)  # reads and writes nothing
        c.relu_()  # reads and writes 1
        c.copy_(a)  # reads 1, writes 1
        torch.add(a, a)  # one argument: reads 1, writes 1
        c.zero_()  # writes 1
        a.expand(3, 10, 20).sum()  # reads 1 and not 3
    unit = 4 * 200
    assert (count.read, count.written) == ((2 + 1 + 1 + 1 + 1) * unit, (1 + 1 + 1 + 1 + 1) * unit + 4)
    assert next(iter(count.by_operator())) == "aten::add"


def test_counting_passes_of_batch_norm_and_convolution(counting):
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight = torch.ones(8, requires_grad=True)
    with counting.CountBytes() as count:
        out = F.batch_norm(x, torch.zeros(8), torch.ones(8), weight, torch.zeros(8), training=True)
    activations = x.numel() * 4
    # x twice, the result once, and vectors per channel: weight, bias, running mean and variance, mean and invstd
    assert activations * 3 <= count.total <= activations * 3 + 10 * 8 * 4
    with counting.CountBytes() as count:
        out.backward(torch.ones_like(x))
    ones = activations
    assert activations * 5 <= count.total - ones <= activations * 5 + 10 * 8 * 4


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("batch_statistics", [True, False])
@pytest.mark.parametrize("with_sums", [True, False])
def test_counting_passes_of_ops(counting, batch_statistics, with_sums, in_place):
    """The sums read everything once more; without them, BatchNorm's backward is one pass."""
    channels_last = {"memory_format": torch.channels_last}
    x, grad, shortcut = (torch.randn(2, 64, 6, 6).to(**channels_last) for _ in range(3))
    pooled, gate = x[:, :, ::2, ::2].clone(**channels_last), torch.ones(2, 6, 6, 8, dtype=torch.uint8)
    argmax = torch.zeros_like(pooled, dtype=torch.uint8)
    branch = values.BnBranch(x, torch.ones(4, 64), batch_statistics)
    other = values.BnBranch(shortcut, torch.ones(4, 64), False)
    suffix = "_" if in_place else ""
    passes = 2 if batch_statistics or with_sums else 1

    def counted(op, *args):
        with counting.CountBytes() as count:
            getattr(ops, op)(*args, with_sums, backend="cpu")
        (launch,) = count.launches
        return launch.read, launch.written

    unit, bits, row = x.numel() * 4, gate.numel(), 64 * 4  # a state is four rows; there is room for three sums
    read, written = counted(f"bn_add_relu_backward{suffix}", values.Gated(grad, gate), branch, None)
    assert (read, written) == (passes * (2 * unit + bits) + 4 * row, unit + 3 * row)
    read, written = counted(f"bn_add_relu_backward{suffix}", values.Gated(grad, gate), branch, other)
    assert (read, written) == (passes * (3 * unit + bits) + 8 * row, 2 * unit + 3 * row)
    read, written = counted(f"bn_relu_maxpool_backward{suffix}", values.Pooled(pooled, argmax), branch)
    assert (read, written) == (passes * (unit + unit // 4 + unit // 16) + 4 * row, unit + 2 * row)
    if in_place:
        read, written = counted("bn_relu_backward_", grad, branch, True)
        assert (read, written) == (passes * 2 * unit + 4 * row, unit + 3 * row)


@pytest.mark.parametrize("name", ["tiny.basic", "tiny.bottleneck"])
def test_counted_bytes_of_eager_agree_with_the_closed_form(traffic, counting, blocks, name):
    """Two counts that share nothing: operators' arguments as run, and kernels' operand lists from the shapes."""
    block = blocks.TINY[name]
    module, batch = blocks.make_block(block).to(memory_format=torch.channels_last), 16
    x = torch.randn(batch, block.in_channels, block.size, block.size).to(memory_format=torch.channels_last)
    x.requires_grad_()
    out = module(x)
    with counting.CountBytes() as count:
        module(x).backward(torch.ones_like(out, memory_format=torch.preserve_format))
    ones = out.numel() * 4
    expected = traffic.bytes_moved(block, "eager", "train", batch, 4)
    vectors = 4 * 8 * 30 * max(block.in_channels, block.out_channels)  # per-channel vectors are not in the formula
    assert expected <= count.total - ones <= expected + vectors
    assert vectors < 0.1 * expected


def test_launches_count_where_an_op_makes_some(traffic, counting):
    """Under triton, on meta tensors, as launched.py counts; under cpu as operators."""
    from memory_traffic import launched

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
    for mode in (counting.CountRun, counting.CountBytes):
        with mode() as count:
            fused(x)
        totals.append(count.by_operator())
    assert totals[0] == totals[1] and any(name.startswith("fusedres::") for name in totals[0])


def test_traffic_prints_the_table(capsys):
    import traffic

    traffic.main([])
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["eager"] == ["73.3", "128.5", "440.6"]
    traffic.main(["--block", "18:layer2.0"])
    out = capsys.readouterr().out
    assert all(f"\n{mode}: " in f"\n{out}" for mode in traffic.MODES)
    assert "projection wgrad: dy, x -> reduced" in out
