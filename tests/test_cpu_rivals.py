"""bench_model.py --rivals: ways of inference on a CPU, each in its own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from suite import cpu_inference

    return cpu_inference


def work_of(batch: int, dtype: str) -> Any:
    from suite.models import Work
    from suite.precision import PRECISIONS

    return Work("resnet18", "infer", batch, PRECISIONS[dtype], 32)


def test_ways_are_timed_in_processes_of_their_own(inference: Any) -> None:
    from common.rows import ROW_KEYS

    work = work_of(2, "float32")
    rows, notes = inference.measure(work, ["eager", "library", "frozen"], rounds=2)
    assert [row["variant"] for row in rows] == ["eager", "library", "frozen"] and notes == []
    for row in rows:
        assert tuple(row) == ROW_KEYS and row["rounds"] == 2 and row["shape"] == [2, 3, 32, 32]
        assert row["images_per_s"] == pytest.approx(2 / row["median_s"])
        assert 0 <= row["slow_percent"] <= 100 and row["page_faults"] >= 0
    assert [row["conv"] is None for row in rows] == [True, False, False] and rows[2]["frozen"]
    goals = inference.goals(rows)
    assert [line[3] for line in goals] == ["library over eager"] and goals[0][-1] in ("met", "missed")


def test_what_is_missing_or_wrong_is_said(inference: Any) -> None:
    work = work_of(1, "bfloat16")
    if not pytest.importorskip("onnx", reason="a package that may be missing"):
        return
    rows, notes = inference.measure(work, ["eager", "onnxruntime"], rounds=1)
    assert [row["variant"] for row in rows] == ["eager"] and notes[0].startswith("onnxruntime: ")
    with pytest.raises(RuntimeError, match="unheard"):
        inference.Rival("unheard of", work, 1)


def test_goals_compare_ratios_of_the_same_case(inference: Any) -> None:
    def row(variant: str, ratio: float, batch: int = 8) -> dict[str, Any]:
        about = {"name": "resnet50", "phase": "infer", "shape": [batch, 3, 224, 224], "dtype": "float32"}
        return about | {"variant": variant, "ratio": {"median": ratio}}

    lines = inference.goals([row("eager", 1.0), row("frozen", 1.5), row("openvino", 1.6), row("library", 1.1)])
    assert [(line[3], line[5], line[6]) for line in lines] == [
        ("frozen over openvino", "0.94x", "missed"),
        ("library over eager", "1.10x", "missed"),
    ]
    assert inference.goals([row("frozen", 1.5), row("openvino", 1.0, batch=1)]) == []


def test_a_probe_notices_a_slow_machine(inference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "PATIENCE", 0.0)
    times = iter([*[1.0] * 50, 1.1, 1.2, 1.3, 1.4, 0.9, 0.9, 1.04, 1.05])
    monkeypatch.setattr(inference.Probe, "_seconds", lambda self: next(times))
    probe = inference.Probe()
    assert [probe.is_fast() for _ in range(4)] == [True, False, True, False]


def test_options(inference: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_model

    assert bench_model.parse(["--device", "cpu", "--batch", "1", "8"]).batch == [1, 8]
    with pytest.raises(SystemExit, match="2"):
        bench_model.parse(["--device", "cpu", "--rivals", "--dtype", "float16"])
    assert "--rivals: --dtype must be one of float32, bfloat16" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        bench_model.parse(["--device", "cpu", "--rivals", "--keep-pages"])
