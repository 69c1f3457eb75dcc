"""The benchmark of the residual family's other blocks: every design runs fused, agrees with its equation, has a row."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import fusedres

pytestmark = pytest.mark.usefixtures("benchmark_scripts")


@pytest.fixture(scope="module")
def rows(tmp_path_factory, benchmark_scripts):
    import bench_block

    path = tmp_path_factory.mktemp("designs") / "rows.json"
    arguments = ["--device", "cpu", "--batch", "2", "--pairs", "1", "--json", str(path), "--blocks"]
    from common.designs import TINY_DESIGNS

    assert bench_block.main([*arguments, *TINY_DESIGNS]) == 0
    return json.loads(path.read_text())


def test_every_design_has_its_rows(rows):
    from common.designs import DESIGNS, TINY_DESIGNS

    assert [name.removeprefix("tiny.") for name in TINY_DESIGNS] == list(DESIGNS)
    variants = ("eager_nchw", "eager", "conv_only", "fused")
    expected = {(n, p, v) for n in TINY_DESIGNS for p in ("train", "infer") for v in variants}
    assert {(r["name"], r["phase"], r["variant"]) for r in rows} == expected
    for row in rows:
        assert row["op"] == "design" and row["counted_bytes"] > 0
        assert (row["backend"] == "cpu") == (row["variant"] == "fused")  # None would say that it ran unfused
    by_key = {(r["name"], r["phase"], r["variant"]): r for r in rows}
    for name in TINY_DESIGNS:
        fused, eager = (by_key[name, "train", variant] for variant in ("fused", "eager"))
        assert 0 < fused["saved_bytes"] < eager["saved_bytes"]
        assert fused["counted_bytes"] < eager["counted_bytes"]


def test_designs_are_their_equations():
    """The eager module has the forward of the equation, and shares every parameter with the fused one."""
    from common.designs import TINY_DESIGNS, fused

    for design in TINY_DESIGNS.values():
        module = design.eager()
        names = [name for name, _ in module.named_parameters()]
        assert type(module).forward is not type(module).fused.forward
        assert type(fused(module)).__module__.startswith("fusedres.")
        assert [name for name, _ in module.named_parameters()] == names


def test_a_wrong_design_is_found(monkeypatch, capsys):
    import bench_block
    from common import designs

    def wrong(module: nn.Module) -> nn.Module:
        module.__class__ = module.fused
        with torch.no_grad():
            module.conv2.weight.mul_(1.001)
        return module

    monkeypatch.setattr(designs, "fused", wrong)
    arguments = ["--device", "cpu", "--batch", "2", "--pairs", "1", "--blocks", "tiny.preact.basic"]
    assert bench_block.main(arguments) == 1
    assert "disagrees" in capsys.readouterr().err


def test_shapes_of_designs():
    from common.designs import DESIGNS

    bottleneck, projected = DESIGNS["preact.bottleneck"], DESIGNS["preact.basic.projection"]
    assert [c.name for c in bottleneck.convolutions] == ["conv1", "conv2", "conv3"]
    assert (projected.out_channels, projected.out_size) == (128, 28)
    assert [c.kernel for c in projected.convolutions] == [3, 3, 1]
    assert [c.name for c in DESIGNS["se.basic"].convolutions] == ["conv1", "conv2"]  # not the excitation's
    assert fusedres.report(DESIGNS["se.bottleneck"].make())[0].fused
