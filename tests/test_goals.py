"""The goals of benchmarks/suite/goals.py, evaluated on made-up rows."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def model(case: str, variant: str, ratio: float, **more: object) -> dict:
    """Return a row; eager takes one second, and the traffic model's bound is a quarter of that."""
    ours = variant.removeprefix("graphed ") in ("library", "fused")
    row = {"case": case, "name": "resnet50", "phase": "train", "shape": [256, 3, 224, 224], "dtype": "bfloat16"}
    row |= {"device": "NVIDIA H100 80GB HBM3", "variant": variant, "conv": "fused" if ours else None}
    row |= {"ratio": {"median": ratio}, "median_s": 1 / ratio, "bound_s": 0.25, "images_per_s": 256 * ratio}
    return row | {"peak_bytes": int(1e9 / ratio), "kind": "graphs" if "graphed" in variant else "plain"} | more


def line(rows: dict, name: str) -> list[str]:
    from suite import goals

    found = [cells for cells in goals.table(rows) if cells[0] == name]
    assert len(found) == 1
    return found[0][1:]


def test_without_rows_nothing_is_claimed():
    from suite import goals

    table = goals.table({})
    assert len(table) == len(goals.GOALS) == 14
    assert all(cells[2:] == ["not measured", "–", ""] for cells in table)


def test_over_eager_is_the_fastest_way_without_graphs():
    rows = {"models": [
        model("a", "eager", 1.0), model("a", "library", 1.7), model("a", "fused", 2.1), model("b", "eager", 1.0),
        model("b", "graphed fused", 3.0), model("c", "eager", 1.0, kind="compile"),
        model("c", "fused", 2.5, kind="compile"),
    ]}  # fmt: skip
    assert line(rows, "ResNet-50 training over eager") == ["≥ 2.00x", "2.10x (fused)", "4.00x", "met"]
    assert line(rows, "ResNet-18 training over eager")[1] == "not measured"


@pytest.mark.parametrize(
    "other",
    [{"dtype": "float16"}, {"phase": "infer"}, {"shape": [64, 3, 224, 224]}, {"device": "NVIDIA A100"}],
    ids=str,
)
def test_rows_of_other_conditions_do_not_count(other):
    rows = {"models": [model("a", "eager", 1.0) | other, model("a", "fused", 2.1) | other]}
    assert line(rows, "ResNet-50 training over eager")[1] == "not measured"


def test_over_compile_is_within_a_run_and_the_least_over_runs():
    """CUDA graphs count only against a compiled model with graphs."""
    name = "ResNet-50 training over torch.compile"
    rows = [
        model("plain", "eager", 1.0), model("plain", "fused", 2.4),
        model("compile", "compile", 1.2), model("compile", "fused", 2.4), model("compile", "graphed fused", 9.0),
    ]  # fmt: skip
    assert line({"models": rows}, name) == ["≥ 1.50x", "2.00x (fused over compile)", "3.33x", "met"]
    rows += [model("graphs", "graphed compile", 1.6), model("graphs", "graphed fused", 2.0)]
    found = line({"models": rows}, name)
    assert found == ["≥ 1.50x", "1.25x (graphed fused over graphed compile)", "2.50x", "missed"]


def test_memory_is_the_least_of_the_ways_beside_what_is_kept():
    ways = (("eager", 1.0, 800), ("library", 1.25, 600), ("fused", 2.0, 240))
    rows = {"models": [model("a", v, r, saved_bytes=kept) for v, r, kept in ways]}
    assert line(rows, "ResNet-50 peak training memory over eager's") == ["≤ 0.60x", "0.50x (fused)", "0.30x", "met"]
    rows["models"][-1]["saved_bytes"] = None
    assert line(rows, "ResNet-50 peak training memory over eager's") == ["≤ 0.60x", "0.50x (fused)", "–", "met"]


def op(op: str, backend: str, percent: float, **more: object) -> dict:
    row = {"op": op, "name": f"{op} of this shape", "backend": backend, "percent_of_copy": percent, "flops": 0}
    return row | {"device": "NVIDIA H200", "median_s": 1e-3, "counted_bytes": 1 << 30} | more


def test_the_worst_op_counts_with_its_faster_backend():
    rows = {"all-ops": [
        op("bn_relu", "triton", 95.0), op("bn_add_relu", "triton", 60.0), op("bn_add_relu", "cuda", 88.4),
        op("bn_finalize", "triton", 3.0, counted_bytes=4096), op("conv_fprop", "triton", 40.0, flops=10**9),
        op("conv_fprop", "library", 20.0, variant="product alone"), op("gram", "triton", 1.0, variant="candidate"),
    ]}  # fmt: skip
    name = "each op without a product, of a copy's rate"
    assert line(rows, name) == ["≥ 85%", "88% (bn_add_relu, cuda)", "100%", "met"]
    rows["all-ops"].append(op("bn_statistics", "triton", 70.0))
    assert line(rows, name) == ["≥ 85%", "70% (bn_statistics, triton)", "100%", "missed"]


def test_images_per_second_are_of_their_device():
    rows = {"models": [model("a", "eager", 1.0), model("a", "fused", 30.0)]}
    assert line(rows, "ResNet-50 training, MLPerf 4.0 on an H100") == [
        "≥ 7,160 images/s", "7,680 images/s (fused)", "1,024 images/s", "met",
    ]  # fmt: skip
    assert line(rows, "ResNet-50 training, MLPerf 4.0 on an H200")[1] == "not measured"


def test_auto_is_as_slow_as_its_slowest_block():
    def row(ratio: float, **more: object) -> dict:
        about = {"name": "resnet50.layer1.0", "phase": "train", "shape": [64, 64, 56, 56], "device": "NVIDIA H200"}
        return about | {"variant": "auto", "median_s": 1e-3, "ratio": {"median": ratio}} | more

    rows = [{"case": "dispatch"}, row(1.4), row(1.0, name="resnet18.layer4.1"), row(1.0, variant="eager")]
    name = "auto over eager, slowest block"
    found = line({"dispatch": rows}, name)
    assert found == ["≥ 0.98x", "1.00x (resnet18.layer4.1 train batch 64)", "–", "met"]
    assert line({"dispatch": [*rows, row(0.9, phase="infer")]}, name)[-1] == "missed"
    assert line({"dispatch": [row(0.9, device="AMD EPYC")]}, name)[1] == "not measured"


def test_the_floor_of_a_model_is_the_sum_of_its_parts():
    """At these rates, either memory or arithmetic decides for every part."""
    from memory_traffic import closed_form
    from suite import floors

    slow_memory = {"copy_bytes_per_s": 1.0, "matmul_flops_per_s": 1e30}
    floor = floors.of_model("resnet50", "train", 8, 2, slow_memory)
    assert floor.seconds == floor.bytes
    per_image = (floors.of_model("resnet50", "train", 16, 2, slow_memory).bytes - floor.bytes) / 8 / 1e6
    rows = {row["mode"]: row["resnet50"] for row in closed_form.table()}
    assert per_image == pytest.approx(rows["one_pass"] + closed_form.stem_bytes(True) / 1e6, rel=1e-3)
    slow_products = {"copy_bytes_per_s": 1e30, "matmul_flops_per_s": 1.0}
    floor = floors.of_model("resnet50", "infer", 1, 2, slow_products)
    assert floor.seconds == floor.flops == pytest.approx(8.2e9, rel=0.02)  # 4.1 G multiplications
    assert floors.of_model("tiny", "train", 8, 2, slow_memory) is None
