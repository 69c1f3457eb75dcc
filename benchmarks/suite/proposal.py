"""DIR/dispatch.json, the table of what was fastest that the package reads: from rows, then tried, then refined."""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.models.resnet import BasicBlock
from traffic import PHASES

from fusedres import dispatch
from fusedres.dispatch import Table, store
from fusedres.tune.command import Tuning
from fusedres.tune.shapes import Subject, subjects
from fusedres.tune.ways import Case as TuneCase
from suite import block_rows, choices
from suite.journal import Journal
from suite.settings import Case, Settings

STEPS = ("ops", "blocks")  # whose rows are read


def cases(settings: Settings) -> list[Case]:
    """The proposal, in one row and as a table; "auto" beside eager; then, with time left, whose each product is."""
    if settings.tiny:
        found = [TuneCase(Subject("tiny", BasicBlock(8, 8).to("meta"), (8, 6, 6)), 2, "float32", "infer")]
    else:
        found = [
            TuneCase(subject, batch, "bfloat16", phase)
            for batch in (256, 64)
            for phase in PHASES
            for subject in subjects(["resnet50", "resnet18"], 224)
        ]
    tune = [Case(str(case), lambda c=case: _tune(settings, c), 90) for case in found]
    auto = block_rows.auto_cases(settings, lambda: _follow(settings))
    return [Case("dispatch", lambda: _propose(settings)), *auto, *tune]


def _path(settings: Settings) -> Path:
    return settings.out / "dispatch.json"


def _propose(settings: Settings) -> None:
    here = settings.where["device"]
    ops, of_blocks = ([r for r in Journal(settings.out, step).rows() if r.get("device") == here] for step in STEPS)
    best = choices.configs(ops)
    device = store.family(settings.device)
    _path(settings).unlink(missing_ok=True)
    backend = "triton" if settings.on_gpu else "cpu"
    labels = {problem: found["config"] for problem, found in best.items()}
    entries = choices.entries(of_blocks)
    store.update(_path(settings), Table(device, backend, store.versions(), settings.where["date"], entries, labels))
    settings.row(
        "dispatch", configs=best, ops=choices.backends(ops), blocks=choices.blocks(of_blocks),
        table=f"fusedres/dispatch/measured/{store.file_name(device)}",
    )  # fmt: skip


def _follow(settings: Settings) -> None:
    """From now on "auto" follows the proposal in this process."""
    device = torch.empty(0, device=settings.device).device  # with its index, as tensors have it
    dispatch.install(device, store.read(_path(settings), store.family(device)))


def _tune(settings: Settings, case: TuneCase) -> None:
    """Each product, this package's or the library's, with the configs that are known."""
    backend = "triton" if settings.on_gpu else "cpu"
    rounds = 12 if settings.on_gpu else 1
    tuning = Tuning(settings.device, backend, _path(settings), rounds=rounds, tile_sizes=False, say=lambda line: None)
    tuning.run([case])
    for wrong in tuning.left_out:
        settings.row(str(case), backend=backend, error=wrong)
    for entry in tuning.entries.values():
        settings.row(str(case), backend=backend, way=str(entry.way), eager_over_way=entry.eager_over_way)
