"""Write DIR/dispatch.json, the table of the fastest ways that the package reads, from rows; then time it."""

from __future__ import annotations

from fusedres.dispatch import Table, store
from suite import block_rows, choices
from suite.journal import Journal
from suite.settings import Case, Settings

STEPS = ("ops", "blocks")  # the steps with the rows that are read


def cases(settings: Settings) -> list[Case]:
    """Return the case that writes the table, and the cases of "auto", which follows it, against eager."""
    return [Case("dispatch", lambda: _propose(settings)), *block_rows.auto_cases(settings)]


def _propose(settings: Settings) -> None:
    here = settings.where["device"]
    ops, of_blocks = ([r for r in Journal(settings.out, step).rows() if r.get("device") == here] for step in STEPS)
    best, entries = choices.configs(ops), choices.entries(of_blocks)
    device, path = store.family(settings.device), choices.path(settings)
    backend = "triton" if settings.on_gpu else "cpu"
    labels = {problem: found["config"] for problem, found in best.items()}
    path.unlink(missing_ok=True)
    store.update(path, Table(device, backend, store.versions(), settings.where["date"], entries, labels))
    path.with_name(f"{path.name}.lock").unlink()  # no other process writes the table
    settings.row(
        "dispatch", configs=best, ops=choices.backends(ops), blocks=choices.blocks(of_blocks),
        table=f"fusedres/dispatch/measured/{store.file_name(device)}",
    )  # fmt: skip
