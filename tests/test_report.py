"""The README's tables and the plots are made from the committed rows; runs of the GPU suite become results files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def report():
    import report

    return report


def made_up(**fields: object) -> dict:
    """Return a row with made-up values in every field."""
    from common.rows import ROW_KEYS

    row = dict.fromkeys(ROW_KEYS) | {"device": GPU, "versions": {"torch": "0"}, "date": "2000-01-01", "commit": "none"}
    row |= {"rounds": 3, "dtype": "bfloat16", "phase": "train", "median_s": 0.01, "shape": [256, 3, 224, 224]}
    return row | {"ratio": {"median": 1.0, "low": 0.9, "high": 1.1}, "data": "synthetic", "case": "a"} | fields


def of_block(variant: str, ratio: float, **fields: object) -> dict:
    low_high = {"median": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
    ours = "fused" if variant.removeprefix("graphed ") in ("library", "fused") else None
    row = made_up(op="bottleneck", name="resnet50.layer1.1", variant=variant, ratio=low_high, conv=ours)
    return row | {"median_s": 0.01 / ratio} | fields


def of_model(variant: str, ratio: float, **fields: object) -> dict:
    row = of_block(variant, ratio, op="model", name="resnet50", bound_s=0.004, step="models")
    row |= {"images_per_s": 25600 * ratio, "peak_bytes": int(1e10 / ratio), "percent_of_bound": 40.0, "kind": "plain"}
    return row | fields


def of_op(op: str, percent: float, **fields: object) -> dict:
    row = made_up(op=op, name=f"{op} x", backend="triton", percent_of_bound=percent, percent_of_copy=percent)
    row |= {"flops": 3 << 20, "counted_bytes": 1 << 20, "bytes_per_s": 1e12, "flops_per_s": 3e12, "step": "ops"}
    return row | {"copy_bytes_per_s": 3e12, "matmul_flops_per_s": 7e14} | fields


# --- committed rows ---------------------------------------------------------------------------------------------------


def test_readme_shows_the_rows(report):
    for path, numbers in report.DOCUMENTS.items():
        text = path.read_text()
        assert report.with_numbers(text, numbers(RESULTS)) == text


def test_another_number_is_noticed(report):
    text = (ROOT / "README.md").read_text()
    number = text.partition(report.BEGIN)[2].partition("**")[2].partition("**")[0]
    assert float(number) > 0
    wrong = text.replace(f"**{number}**", "**9.99**", 1)
    assert report.with_numbers(wrong, report.summary(RESULTS)) != wrong


def test_plots_are_drawn_from_the_rows(report):
    assert report.outdated_plots(RESULTS) == []
    plots = sorted(path.name for path in RESULTS.glob("*.svg"))
    assert plots, "no plot is committed"
    shown = (ROOT / "docs" / "numbers.md").read_text()
    assert [f"results/{name})" in shown for name in plots] == [True] * len(plots)


def test_missing_markers(report):
    with pytest.raises(SystemExit, match="a document with numbers must have the lines"):
        report.with_numbers("nothing", "numbers")


# --- made-up rows -----------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / f"{name}.json").write_text(json.dumps(rows))


def test_a_changed_row_makes_its_plot_and_the_readme_outdated(report, tmp_path):
    rows = [of_block("eager", 1.0), of_block("conv_only", 2.0), of_block("fused", 0.7)]
    write(tmp_path, "blocks", rows)
    name = "nvidia-h100-80gb-hbm3-speedup.svg"
    assert report.outdated_plots(tmp_path) == [name]
    report.draw(tmp_path)
    assert report.outdated_plots(tmp_path) == []
    first, text = (tmp_path / name).read_bytes(), report.section(tmp_path)
    assert "**0.70** (0.60–0.80)" in text and f"results/{name})" in text  # losses are shown too
    report.draw(tmp_path)
    assert (tmp_path / name).read_bytes() == first  # nothing is drawn again
    write(tmp_path, "blocks", [*rows[:2], of_block("fused", 0.8)])
    assert report.outdated_plots(tmp_path) == [name] and report.section(tmp_path) != text
    write(tmp_path, "blocks", [])
    report.draw(tmp_path)
    assert not (tmp_path / name).exists()


def test_a_plot_shows_the_latest_measurement_only(report):
    """The later of two runs is shown, although the earlier one was faster."""
    from reporting import plots

    early = [of_block("eager", 1.0, date="2000-01-01"), of_block("fused", 9.0, date="2000-01-01")]
    late = [of_block("fused", 1.5, date="2000-01-02"), of_block("fused", 7.0, date="2000-01-03", kind="compile")]
    assert [row["ratio"]["median"] for row in plots.latest([*late, *early], "plain").values()] == [1.0, 1.5]


def test_all_kinds_of_plots_and_the_same_rows_give_the_same_file(report, tmp_path):
    rows = [of_block("eager", 1.0), of_block("fused", 1.5), of_block("fused", 1.2, phase="infer")]
    rows += [of_model("eager", 1.0), of_model("library", 1.3), of_model("fused", 2.0)]
    rows += [of_op("bn_relu", 90.0), of_op("gram", 70.0, backend="cuda")]
    write(tmp_path, "rows", rows)
    report.draw(tmp_path)
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}
    assert {name.removeprefix("nvidia-h100-80gb-hbm3-") for name in drawn} == {
        "speedup.svg", "models.svg", "roofline.svg",
    }  # fmt: skip
    for name in drawn:
        (tmp_path / name).unlink()
    report.draw(tmp_path)
    assert drawn == {path.name: path.read_bytes() for path in tmp_path.glob("*.svg")}


def test_the_block_table_takes_the_fastest_way_and_rival_of_a_kind(report):
    from reporting.tables import blocks_table

    rows = [
        of_block("eager", 1.0), of_block("eager_nchw", 0.5), of_block("library", 1.4), of_block("fused", 1.8),
        of_block("compile", 1.3), of_block("cudnn", 1.1), of_block("fused", 9.0, dtype="float16"),
        of_block("graphed compile", 1.5), of_block("graphed fused", 3.0),
    ]  # fmt: skip
    header, _, line = (text.strip("| ").split(" | ") for text in blocks_table(rows).splitlines()[2:5])
    cells = dict(zip(header, line, strict=True))
    assert cells["way"] == "fused" and cells["eager / fused (95%)"] == "**1.80** (1.70–1.90)"
    assert cells["fastest rival"] == "compile" and cells["in CUDA graphs"] == "2.00 over compile"
    assert "dtype" not in cells and "convolutions ms" not in cells  # there is no eager row in float16


def test_the_model_and_op_tables(report):
    from reporting.tables import models_table, ops_table

    models = models_table([of_model("eager", 1.0), of_model("library", 1.3), of_model("compile", 1.2)])
    assert "synthetic data:" in models
    assert "| 25,600 | 33,280 | library | **1.30** (1.20–1.40) | compile |" in models
    assert "| 40 | 10,000 → 7,692 |" in models
    ops = ops_table([of_op("bn_relu", 90.0), of_op("bn_relu", 80.0, shape=[1, 2]), of_op("bn_relu", 95.0)])
    assert "| bn_relu | triton | 3 | 90 | 80 | 1x2 | 95 | 1e+03 |" in ops


def test_goals_are_shown_where_a_gpu_has_rows(report, tmp_path):
    write(tmp_path, "cpu", [of_model("eager", 1.0, device="a CPU"), of_model("fused", 2.0, device="a CPU")])
    assert "Goals" not in report.section(tmp_path)
    write(tmp_path, "gpu", [of_model("eager", 1.0), of_model("fused", 2.4)])
    text = report.section(tmp_path)
    assert "| ResNet-50 training over eager | ≥ 2.00x | 2.40x (fused) | 2.50x | met |" in text
    assert "| ResNet-18 training over eager | ≥ 1.60x | not measured | – |  |" in text


def test_processors_of_one_name_with_other_instructions_are_other_machines(report, tmp_path):
    for isa, ratio in (("avx2", 2.0), ("avx2 avx512f", 1.5)):
        rows = [of_model("eager", 1.0), of_model("library", ratio)]
        write(tmp_path, isa[-4:], [row | {"device": "a CPU", "isa": isa} for row in rows])
    assert set(report.wanted_plots(report.measured(report.load(tmp_path)))) == {
        "a-cpu-with-avx2-models.svg",
        "a-cpu-with-avx2-avx512f-models.svg",
    }
    text = report.section(tmp_path)
    assert text.count("Models on a CPU with avx2,") == text.count("Models on a CPU with avx2 avx512f,") == 1


def test_the_picture_of_models_has_the_memory_of_training_alone(tmp_path):
    """On a GPU inference has a peak too. The caption is that of the rows that are drawn."""
    from reporting import plots

    ways = {"eager": 1.0, "library": 1.3}
    rows = [of_model("eager_nchw", 0.9, shape=[64, 3, 224, 224])]
    rows += [of_model(way, ratio, phase=phase) for phase in ("train", "infer") for way, ratio in ways.items()]
    plots.models(rows, tmp_path / "models.svg")
    drawn = (tmp_path / "models.svg").read_text()
    speed, memory = drawn.split("Speed relative to eager", 1)
    assert speed.count("<!-- inference -->") == 1 and memory.count("<!-- training -->") == 1
    assert "Peak memory of training" in memory and "<!-- inference -->" not in memory
    assert "batch 256" in memory and "batch 64" not in memory


# --- runs of the suite ------------------------------------------------------------------------------------------------


def journal(folder: Path, step: str, rows: list[dict]) -> None:
    lines = [{"event": "start", "case": "a", "limit": 1}, *rows, {"event": "end", "why": "finished"}]
    (folder / f"{step}.jsonl").write_text("".join(json.dumps({"step": step} | line) + "\n" for line in lines))


def test_a_run_becomes_a_file_a_step(report, tmp_path):
    from common.rows import ROW_KEYS

    run, results = tmp_path / "run", tmp_path / "results"
    run.mkdir()
    results.mkdir()
    short = {key: value for key, value in of_op("bn_relu", 90.0).items() if value is not None}
    journal(run, "ops", [short, {"case": "a", "error": "wrong", "device": GPU}])
    journal(run, "tests", [{"case": "test", "test": "a", "outcome": "passed"}])  # its rows name no device
    written = report.add(run, results)
    assert [path.name for path in written] == ["nvidia-h100-80gb-hbm3-ops.json", "nvidia-h100-80gb-hbm3-tests.json"]
    timed, failed = json.loads(written[0].read_text())
    assert set(ROW_KEYS) <= timed.keys() and failed["error"] == "wrong" and "event" not in failed
    assert "| bn_relu | triton | 1 | 90 |" in report.section(results)


def test_what_is_no_result_is_refused(report, tmp_path):
    with pytest.raises(SystemExit, match="holds no rows"):
        report.add(tmp_path, tmp_path)
    journal(tmp_path, "models", [of_model("eager", 1.0, name="tiny")])
    with pytest.raises(SystemExit, match="toy shapes are no results"):
        report.add(tmp_path, tmp_path)


def test_candidates_go_where_a_file_grows_too_large(report, monkeypatch):
    rows = [of_op("gram", 90.0), *(of_op("gram", 80.0, variant="candidate") for _ in range(20))]
    monkeypatch.setattr(report, "LARGEST", 10_000)
    assert [row["variant"] for row in json.loads(report._fitting(rows))] == [None]
    monkeypatch.setattr(report, "LARGEST", 100)
    with pytest.raises(SystemExit, match="more than the 100 of a results file"):
        report._fitting(rows)
