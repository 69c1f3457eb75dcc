"""The benchmarks run, refuse wrong results, and write the files that they name."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import HANG
from torch import nn

import fusedres

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


pytestmark = pytest.mark.usefixtures("benchmark_scripts")


@pytest.fixture(scope="module")
def harness():
    from common import harness

    return harness


@pytest.fixture(scope="module")
def blocks():
    from common import blocks

    return blocks


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / name), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=HANG,
        cwd=BENCHMARKS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )


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
    assert "ratio" not in captured.out  # no table of times is printed


def test_no_relu_is_left_to_rounding(harness, blocks):
    """clear_masks moves every pre-activation away from zero."""
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
    # The number of tensors that each op reads and writes, and of masks with one bit per element; a reduction before an
    # elementwise pass reads its operands once more.
    passes = {
        "bn_statistics": (1, 0),
        "bn_relu": (2, 0),
        "bn_add_relu identity": (3, 1),
        "bn_add_relu two branches": (3, 1),
        "bn_add_relu zero-pad": (4, 1),  # shortcut: half of the channels, four times the pixels, all counted
        "bn_add_relu_backward identity": (5, 2),
        "bn_add_relu_backward two branches": (8, 2),
        "bn_relu_backward_": (5, 0),
        "relu_backward": (2, 1),
        "gram": (2, 0),
        "shortcut_grad_": (3, 1),
        "dense_append_": (2, 0),
        "dense_bn_relu": (2, 0),
        "dense_bn_relu_backward_": (4, 0),
        "dense_gradient": (3, 0),
        "gated_tail highway": (4, 0),
        "gated_tail_reduce highway": (4, 0),
        "gated_tail_apply highway": (7, 0),
        "gated_tail SiLU before the add": (3, 0),
        "gated_tail_reduce SiLU before the add": (2, 0),
        "gated_tail_apply SiLU before the add": (3, 0),
        "gated_tail squeeze-and-excitation": (3, 1),
        "gated_tail_reduce squeeze-and-excitation": (2, 1),
        "gated_tail_apply squeeze-and-excitation": (4, 1),
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
    """A Gram matrix takes every pair of channels once, and the affine map and ReLU of each element."""
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

    right = bench_ops.ops.bn_relu

    def wrong(x, state, *, backend):
        return right(x, state, backend=backend) * (1.0 if backend == "reference" else 1.001)

    monkeypatch.setattr(bench_ops.ops, "bn_relu", wrong)
    small = ["--device", "cpu", "--sizes", "4", "--channels", "16", "--batch", "2", "--pairs", "1"]
    small += ["--ops", "bn_relu", "--fresh-pages"]
    assert bench_ops.main(small) == 1
    assert "disagrees with reference" in capsys.readouterr().err


# --- bench_host -------------------------------------------------------------------------------------------------------


def test_bench_host_times_each_phase(capsys):
    import bench_host

    threads = torch.get_num_threads()
    try:
        bench_host.main(["--blocks", "tiny.basic", "tiny.bottleneck", "--rounds", "3", "--device", "cpu"])
    finally:
        torch.set_num_threads(threads)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    timed = [line for line in lines if line and line[0].startswith("tiny.")]
    expected = [(name, phase) for name in ("tiny.basic", "tiny.bottleneck") for phase in bench_host.PHASES]
    assert [tuple(line[:2]) for line in timed] == expected
    assert all(float(eager) > 0 and float(fused) > 0 for _, _, eager, fused, *_ in timed)


# --- bench_convolution -----------------------------------------------------------------------------------------------


def test_bench_convolution_times_each_direction(capsys):
    import bench_convolution

    small = ["--depth", "18", "--size", "32", "--batch", "1", "--rounds", "1"]
    bench_convolution.main([*small, "--dtype", "bfloat16"])
    timed = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines() if line[0].isdigit()}
    assert "-" not in timed["1x1/1"] and timed["3x3/1"].count("-") == 3  # only the weight's gradient is a product
    bench_convolution.main(small)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    timed = {tuple(line[:3]): line for line in lines if line and "x" in (*line, "", "")[1] and line[0][0].isdigit()}
    # 20 convolutions: the stem's, two in each of eight blocks, three projections, which read every second pixel
    assert ("3-64", "7x7/2", "32²") in timed and ("64-128", "1x1/1", "4²") in timed
    assert sum(int(line[3]) for line in timed.values()) == 20 and lines[-1][:2] == ["all", "20"]
    for line in timed.values():
        dashes = [value == "-" for value in line[4:]]
        assert dashes == [False, False, False, line[1].endswith("/2"), False, False, False]
        assert all(float(value) > 0 for value in line[4:] if value != "-")


def test_bench_convolution_refuses_results_that_differ(monkeypatch):
    import bench_convolution

    right = bench_convolution.cpu_convolution.convolve
    monkeypatch.setattr(bench_convolution.cpu_convolution, "convolve", lambda *args: 1.001 * right(*args))
    with pytest.raises(RuntimeError, match="forward differs from torch's"):
        bench_convolution.main(["--depth", "18", "--size", "32", "--batch", "1", "--rounds", "1"])


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
    assert done.stderr == ""  # no progress bar, because standard error is no terminal
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
    """The compiler is replaced by the identity. The variant is timed and has rows, but no counted bytes."""
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
    ways = [("train", "library min")]  # memory="min" changes only training
    ways += [(phase, way) for phase in ("train", "infer") for way in ("eager", "eager_nchw", "library")]
    assert sorted((r["phase"], r["variant"]) for r in rows) == sorted(ways)
    out = capsys.readouterr().out
    for r in rows:
        assert tuple(r) == harness.ROW_KEYS and r["op"] == "model" and r["variant"] in out
        assert r["images_per_s"] == pytest.approx(2 / r["median_s"]) and r["percent_of_bound"] > 0
    saved = {r["variant"]: r["saved_bytes"] for r in rows if r["phase"] == "train"}
    assert saved["library"] < 0.75 * saved["eager"]
    with pytest.raises(SystemExit, match="2"):
        bench_model.main(["--device", "cpu", "--size", "16"])
    assert "--size: must be at least 32, got 16" in capsys.readouterr().err
