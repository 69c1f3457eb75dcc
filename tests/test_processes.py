"""processes.once: a value is made once for all workers of a session."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from processes import once


def test_it_is_made_once_for_all_workers(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def make() -> str:
        made.append(len(made))
        return "µ" * len(made)

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    session = tmp_path_factory.mktemp("session")
    monkeypatch.setattr(tmp_path_factory, "_basetemp", session)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: once(tmp_path_factory, "made", make), range(8)))
    assert found == ["µ"] * 8 and made == [0]
    # Each worker has a folder of its own inside the session's folder.
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw1")
    (session / "worker").mkdir()
    monkeypatch.setattr(tmp_path_factory, "_basetemp", session / "worker")
    assert once(tmp_path_factory, "made", make) == "µ" and made == [0]


def test_a_failure_is_not_kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(tmp_path_factory, "_basetemp", tmp_path_factory.mktemp("session"))

    def fail() -> str:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            once(tmp_path_factory, "failed", fail)
    assert once(tmp_path_factory, "failed", lambda: "yes") == "yes"
