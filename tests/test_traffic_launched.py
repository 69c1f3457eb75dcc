"""Bytes counted from the arguments of every launch agree with the closed formulas, and a missing kernel is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import HANG

import fusedres
from fusedres.ops import bn_relu

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def traffic():
    from memory_traffic import closed_form

    return closed_form


@pytest.fixture(scope="module")
def launched():
    from memory_traffic import launched

    return launched


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Count both models in every way, in a process without Triton's interpreter, where configs are small."""
    path = tmp_path_factory.mktemp("launched") / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(BENCHMARKS / "traffic.py"), "--launched", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


@pytest.fixture(scope="module")
def rows(run):
    return {(row["name"], row["way"]): row for row in run[1]["rows"]}


def test_every_block_and_model_has_a_row_a_way(run, rows, launched, traffic):
    names = {name for name, _ in rows}
    assert {"resnet18", "resnet50", "resnet18.layer1.0", "resnet50.layer1.1", "resnet50.layer4.0", "stem"} <= names
    assert rows.keys() == {(name, way) for name in names for way in launched.WAYS}
    for row in rows.values():
        assert "missing" not in row
        assert row["closed_form_mb_image"].keys() == (
            {"eager", "stored_dy"} if row["name"] == "stem" else set(traffic.MODES)
        )
    table, record = run
    assert record["batch"] == 256 and record["versions"]["torch"] == torch.__version__ and record["date"]
    for name in names:
        assert sum(line.split()[:1] == [name] for line in table.splitlines()) == len(launched.WAYS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_blocks_run_in_every_dtype(traffic, launched, dtype):
    """BatchNorm is float32 for half-precision blocks, otherwise it has the block's dtype."""
    for what in (traffic.resnet_blocks(50)["layer2.0"], traffic.Stem()):
        for way in launched.WAYS:
            phases = launched.train_step(what, way, 2, dtype)
            assert all(count.kernels and not count.missing for count in phases.values())


@pytest.mark.parametrize("depth", [18, 50])
def test_a_model_is_the_sum_of_its_blocks(rows, traffic, launched, depth):
    blocks = traffic.resnet_blocks(depth)
    first = {}
    for name, block in blocks.items():
        first.setdefault(block, f"resnet{depth}.{name}")
    for way in launched.WAYS:
        of_blocks = [rows[first[block], way] for block in blocks.values()]
        model = rows[f"resnet{depth}", way]
        for key in ("mb_image", "mb_rest", "mb_image_at_batch"):
            assert model[key] == pytest.approx(sum(row[key] for row in of_blocks))
        for key in ("launches", "operators"):
            assert model[key] == [sum(row[key][phase] for row in of_blocks) for phase in (0, 1)]
    for row in rows.values():
        if "parts" in row:
            assert row["mb_image"] == pytest.approx(sum(part["image_bytes"] for part in row["parts"]) / 1e6)


@pytest.mark.parametrize("name", ["resnet18.layer1.0", "resnet18.layer3.1", "resnet50.layer1.1", "resnet50.layer3.1"])
def test_library_way_is_the_closed_form_and_what_backward_recomputes(rows, traffic, name):
    """Inner activations are not saved, so backward reads y and writes relu(BN(y)) again."""
    depth, _, block_name = name.removeprefix("resnet").partition(".")
    block = traffic.resnet_blocks(int(depth))[block_name]
    recomputed = sum(2 * 2 * c.target for c in block.convolutions[:-1])
    closed = traffic.bytes_moved(block, "library", "train", 1, 2, weights=False)
    assert rows[name, "library"]["mb_image"] * 1e6 == pytest.approx(closed + recomputed, rel=5e-3)


def test_convolutions_are_the_library_s_or_this_package_s(rows):
    def names(way: str, kernel: bool) -> set[str]:
        return {
            p["name"]
            for row in rows.values()
            if row["way"] == way
            for p in row.get("parts", [])
            if p["kernel"] is kernel
        }

    assert {"aten::convolution", "aten::convolution_backward"} <= names("library", False)
    assert not any("conv" in name for name in names("library", True))
    assert not any("convolution" in name for name in names("fused", False) | names("fused min", False))
    assert any("fprop" in name for name in names("fused", True))
    assert any("one_pass" in name for name in names("fused min", True)) and not any(
        "one_pass" in n for n in names("fused", True)
    )


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_each_fusion_moves_less(rows, model):
    ways = [rows[model, way]["mb_image"] for way in ("fused min", "fused", "library")]
    eager = rows[model, "library"]["closed_form_mb_image"]["eager"]
    assert ways == sorted(ways) and ways[-1] < eager


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_one_pass_blocks_move_what_their_closed_form_says(rows, model):
    """The counts agree except for partial sums of tiles and splits, which the formula leaves out."""
    row = rows[model, "fused min"]
    assert 0.98 < row["mb_image"] / row["closed_form_mb_image"]["stored_dy"] < 1.06


def test_the_stem_pools_in_one_pass(rows, launched):
    """Passes: convolution (x → y), statistics (y), BatchNorm to pool (y → out, places); backward sums, dy and wgrad."""
    x, y, out = 3 * 224**2 * 2, 64 * 112**2 * 2, 64 * 56**2 * 2
    places = out // 2
    forward = (x + y) + y + (y + out + places)
    backward = (out + places + y) + (out + places + y + y) + (x + y)
    for way in ("library", "library min"):
        moved = rows["stem", way]["mb_image"] * 1e6
        assert moved == pytest.approx(forward + backward, rel=5e-3)
        assert moved < 0.5 * rows["stem", way]["closed_form_mb_image"]["eager"] * 1e6


def test_the_stem_with_its_own_convolution_moves_what_its_closed_form_says(rows, traffic):
    """There is no statistics pass, and dy is never stored. Partial sums of tiles and splits are within the 5%."""
    goal = traffic.stem_bytes(True) / 1e6
    assert goal == pytest.approx(8.8, abs=0.05)
    for way in ("fused", "fused min"):
        row = rows["stem", way]
        assert row["closed_form_mb_image"]["stored_dy"] == goal
        assert 0.98 * goal < row["mb_image"] <= 1.05 * 8.8
        assert row["mb_image_at_batch"] <= 1.05 * 8.8
        kernels = {part["name"] for part in row["parts"] if part["kernel"]}
        assert {"conv_fprop_kernel", "bn_relu_maxpool_kernel", "bn_relu_maxpool_wgrad_kernel"} <= kernels
        assert not any("convolution" in part["name"] for part in row["parts"])


def test_a_launch_counts_what_it_reads_and_writes(launched):
    x = torch.empty(8, 64, 6, 6, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    state = torch.empty(4, 64, device="meta")
    for stride, pixels in ((1, 36), (2, 9)):
        with fusedres.use_backend("triton"), launched.CountLaunched() as count:
            bn_relu(x, state, None, stride, backend="triton")
        assert count.total == 0 and not count.missing  # no other operator runs
        assert [launch.bytes() for launch in count.kernels] == [2 * 8 * 64 * pixels * 2 + 4 * 64 * 4]


def test_an_op_without_a_kernel_is_an_error(launched, traffic, monkeypatch):
    from fusedres.ops._library import OPS

    op = OPS["bn_relu"]
    kernel = type(op).kernel

    def without(self, backend):
        if self is op:
            raise RuntimeError("bn_relu: there is no triton backend")
        return kernel(self, backend)

    monkeypatch.setattr(type(op), "kernel", without)
    with pytest.raises(launched.MissingKernelError, match=r"library: no triton kernel of bn_relu$"):
        launched.parts(traffic.Block("basic", 8, 8, 8), "library", batch=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launched", "none"], r"--launched: unknown ways ['none']; known: library, "),
        (["--launched", "library", "--itemsize", "4"], "--itemsize must be 2, got 4"),
        (["--launched", "library", "--batch", "0"], "--batch must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_counted_is_refused(arguments, message, capsys):
    import traffic

    with pytest.raises(SystemExit, match="2"):
        traffic.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("model", "goal"), [("resnet50", 161.2), ("resnet18", 40.2)])
def test_one_pass_blocks_reach_the_goal(rows, model, goal):
    """These are MB per image in bfloat16 at 224x224: at most 5% more than the least that these kernels could move."""
    assert rows[model, "fused min"]["mb_image"] <= 1.05 * goal


@pytest.mark.parametrize(("name", "forward", "backward"), [("resnet18.layer1.0", 8, 10), ("resnet18.layer2.0", 8, 14)])
def test_a_basic_block_takes_few_launches(rows, name, forward, backward):
    """Casts of weights, running statistics and counters are included; operators of torch count as launches."""
    row = rows[name, "fused"]
    total = [own + other for own, other in zip(row["launches"], row["operators"], strict=True)]
    assert total[0] <= forward and total[1] <= backward


@pytest.mark.parametrize(
    ("name", "launches", "operators"),
    [
        ("resnet50.layer1.1", (12, 14), (1, 0)),
        ("resnet50.layer2.0", (18, 18), (1, 1)),
        ("resnet18.layer2.0", (12, 16), (1, 0)),
    ],
)
def test_a_one_pass_block_takes_few_launches(rows, name, launches, operators):
    """A unit's small products take six launches; a 16-bit weight may be cast; a shared bias gradient is copied."""
    row = rows[name, "fused min"]
    assert row["launches"][0] <= launches[0] and row["launches"][1] <= launches[1]
    assert row["operators"][0] <= operators[0] and row["operators"][1] <= operators[1]
    units = sum(part["calls"] for part in row["parts"] if part["name"] == "gram_tiles_kernel")
    small = {"project", "state", "fold", "parameters", "quadratic", "constant"}
    calls = {part["name"]: part["calls"] for part in row["parts"]}
    assert units and all(calls[f"one_pass_{name}_kernel"] == units for name in small)
