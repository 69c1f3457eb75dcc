"""The processes of gpu_suite.py: crashes, timeouts and interruptions, and the rows that remain."""

from __future__ import annotations

import textwrap
import time
from argparse import Namespace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


WORKER = """
    import os, sys, time
    sys.path.insert(0, {benchmarks!r})
    from pathlib import Path
    from suite.journal import Journal

    arguments = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    journal = Journal(Path(arguments["--out"]), arguments["--worker"])
    ended = journal.ended()
    for case, limit in (("good", 60), ("crashes once", 60), ("hangs", {limit}), ("last", 60)):
        if case in ended:
            continue
        journal.append(case=case, event="start", limit=limit)
        journal.append(case=case, event="trying", what=case)
        if case == "crashes once" and case not in journal.poison():
            os._exit(11)
        if case == "hangs":
            time.sleep(10**6)
        journal.append(case=case, value=1)
        journal.append(case=case, event="done")
    journal.append(event="end", why="finished")
"""


class Clock:
    """A clock that moves one second per reading while the case "hangs" runs: no machine is too slow for the others."""

    def __init__(self, journal) -> None:
        self.journal, self.now = journal, 1e9

    def time(self) -> float:
        self.now += (self.journal.running() or {}).get("case") == "hangs"
        return self.now

    @staticmethod
    def sleep(_: float) -> None:
        time.sleep(0.05)


def supervised(folder: Path, monkeypatch, seconds: float, limit: float):
    """Run a step of four cases for these seconds of its clock; return how it ends, and its journal."""
    import gpu_suite
    from suite.journal import Journal

    scripts, out = folder / "scripts", folder / "out"
    scripts.mkdir()
    out.mkdir()
    (scripts / "gpu_suite.py").write_text(textwrap.dedent(WORKER).format(benchmarks=str(BENCHMARKS), limit=limit))
    journal = Journal(out, "ops")
    monkeypatch.setattr(gpu_suite, "HERE", scripts)
    monkeypatch.setattr(gpu_suite, "CRASHES", 2)
    clock = Clock(journal)
    monkeypatch.setattr(gpu_suite, "time", clock)
    options = Namespace(out=out, device="cpu", tiny=False, pack=None, call=None, after=None)
    child = gpu_suite.start("ops", options)
    return gpu_suite.supervise("ops", options, clock.now + seconds, child), journal


def test_a_crash_and_a_hang_are_rows_and_not_the_end(tmp_path, monkeypatch):
    how, journal = supervised(tmp_path, monkeypatch, seconds=1000, limit=10)
    assert how == "finished"
    assert [row["case"] for row in journal.rows() if "value" in row] == ["good", "crashes once", "last"]
    errors = [row["error"] for row in journal.rows() if "error" in row]
    assert errors[0] == "the process ended with exit code 11" and all("hung" in error for error in errors[1:])
    assert journal.ended() == {"good", "crashes once", "hangs", "last"} and journal.finished()


def test_time_ends_a_step_and_its_rows_stay(tmp_path, monkeypatch):
    how, journal = supervised(tmp_path, monkeypatch, seconds=20, limit=1000)
    assert how == "time was up"
    rows = [row["case"] for row in journal.rows() if "error" not in row]
    assert rows == ["good", "crashes once"] and not journal.finished()


def test_ctrl_c_ends_the_step_too(tmp_path, monkeypatch):
    """The step runs in a session of its own, which the terminal does not interrupt."""
    import gpu_suite

    children = []

    def interrupted(child, journal, until):
        children.append(child)
        assert child.running()
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_suite, "_watch", interrupted)
    options = Namespace(out=tmp_path, device="cpu", tiny=True, pack=None, call=None, after=None)
    with pytest.raises(KeyboardInterrupt):
        gpu_suite.supervise("ops", options, time.time() + 60, gpu_suite.start("ops", options))
    assert [child.running() for child in children] == [False]


def test_a_line_cut_by_a_kill_costs_only_itself(tmp_path):
    from suite.journal import Journal

    journal = Journal(tmp_path, "ops")
    journal.append(case="a", value=float("nan"))
    with journal.path.open("a") as file:
        file.write('{"case": "b", "val')
    journal.append(case="c", value=2)
    assert [(row["case"], row["value"]) for row in journal.rows()] == [("a", None), ("c", 2)]
