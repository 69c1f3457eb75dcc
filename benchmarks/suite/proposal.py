"""DIR/dispatch.json, the table of what was fastest that the package reads: from rows, then tried."""

from __future__ import annotations

from fusedres.dispatch import Table, store
from suite import block_rows, choices
from suite.journal import Journal
from suite.settings import Case, Settings

STEPS = ("ops", "blocks")  # whose rows are read


def cases(settings: Settings) -> list[Case]:
    """The proposal, in one row and as a table; then "auto", which follows it, beside eager."""
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
    path.with_name(f"{path.name}.lock").unlink()  # nobody else writes it
    settings.row(
        "dispatch", configs=best, ops=choices.backends(ops), blocks=choices.blocks(of_blocks),
        table=f"fusedres/dispatch/measured/{store.file_name(device)}",
    )  # fmt: skip
