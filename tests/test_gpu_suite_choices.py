"""gpu_suite.py's choices from its rows, and that they reach the launch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fusedres.dispatch import UNFUSED, Directions, Way
from fusedres.kernels.gram.triton import gram
from fusedres.kernels.triton_core import launch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_choices_take_the_fastest_that_is_right():
    from suite import choices

    def candidate(config: str, seconds: float, **more: object) -> dict:
        about = {"variant": "candidate", "problem": "gram_tiles float32 8", "op": "gram", "first": config == "a"}
        return about | {"config": config, "median_s": seconds} | more

    rows = [candidate("a", 3.0), candidate("b", 2.0), candidate("c", 1.0, error="wrong")]
    found = choices.configs(rows)["gram_tiles float32 8"]
    assert (found["config"], found["first_over_best"], found["of"]) == ("b", 1.5, 2)

    def block(variant: str, seconds: float) -> dict:
        return {"name": "x", "phase": "train", "shape": [8], "variant": variant, "median_s": seconds}

    found = choices.blocks([block("eager", 2.0), block("conv_only", 0.5), block("fused", 1.0), block("compile", 0.9)])
    assert found["x train batch 8"]["way"] == "fused" and found["x train batch 8"]["eager_over_best"] == 2
    assert choices.blocks([block("eager", 2.0), block("fused", 2.1)])["x train batch 8"]["way"] == "eager"
    assert choices.blocks([block("conv_only", 0.5), block("fused", 1.0)]) == {}


def test_rows_become_a_table():
    from suite import choices

    def row(variant: str, ratio: float, **more: object) -> dict:
        about = {"op": "bottleneck", "shape": [256, 64, 56, 56], "dtype": "bfloat16", "tf32": None, "phase": "train"}
        about |= {"geometry": {"planes": 64, "stride": 1, "shortcut": "projection"}, "kind": "plain"}
        return about | {"variant": variant, "backend": "triton", "median_s": 1.0, "ratio": {"median": ratio}} | more

    own = Directions(True, True, True)
    rows = [row("library", 1.1), row("fused min", 1.3), row("fused", 1.2), row("compile", 1.9), row("conv_only", 2.0)]
    rows += [row("graphed fused", 1.8), row("fused", 1.7, kind="graphs")]
    ((shape, entry),) = choices.entries(rows).items()
    assert shape == ("bottleneck", "projection", 64, 64, 256, 1, 1, 1, 56, 56, 256, "bfloat16", "train")
    assert entry == (Way("triton", own, own, True), 1.3)

    stem = {"op": "stem", "shape": [64, 3, 224, 224], "geometry": {"planes": 64, "stride": 2, "shortcut": None}}
    stem |= {"dtype": "float32", "tf32": True}
    ((shape, entry),) = choices.entries([row("fused", 1.5, **stem)]).items()
    assert shape == ("stem 7x7", "none", 3, 64, 64, 1, 2, 1, 224, 224, 64, "tf32", "train")
    assert entry.way == Way("triton", larger=Directions(True, False, True))

    ((_, entry),) = choices.entries([row("fused min", 0.9, phase="infer"), row("library", 0.97, phase="infer")]).items()
    assert entry == (UNFUSED, 0.97)
    ((_, entry),) = choices.entries([row("fused min", 0.99, phase="infer")]).items()
    assert entry.way == Way("triton", Directions(True, False, False), Directions(True, False, False))


def test_a_measured_choice_reaches_the_launch_and_nothing_else_does():
    x = torch.randn(2, 80, 3, 3, device="meta").contiguous(memory_format=torch.channels_last)

    def pivot_config(pick: launch.Pick | None) -> launch.Config:
        with launch.choosing(pick), launch.record_launches() as launches:
            gram(x, None, 1)
        return next(found for found in launches if found.name == "gram_pivot_kernel")

    first = pivot_config(None)
    second = first.candidates[1]
    assert first.config == first.candidates[0] != second
    key = "gram_pivot float32 80"
    assert pivot_config(launch.measured({key: second.label})).config == second
    assert pivot_config(launch.measured({key: "BLOCK_C=7 w1 s1"})).config == first.config
    assert pivot_config(launch.measured({"gram_pivot float32 81": second.label})).config == first.config


def test_every_candidate_of_a_problem_has_its_own_label():
    from common.networks import Block
    from memory_traffic.launched import train_step

    steps = train_step(Block("bottleneck", 256, 64, 56), "fused min", 8, torch.bfloat16)
    launches = [found for count in steps.values() for found in count.kernels]
    assert len(launches) > 10
    for found in launches:
        labels = [config.label for config in found.candidates]
        assert len(set(labels)) == len(labels), (found.name, labels)
