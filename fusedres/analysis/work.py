"""What training has done so far, kept in a folder, so that a killed run can go on."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fusedres import files
from fusedres._version import __version__
from fusedres.analysis.results import AnalysisError
from fusedres.backends import backend_for

_PREFIX = "fusedres-"  # of all files here
_RUNS, _LOCK = f"{_PREFIX}runs.json", f"{_PREFIX}lock"
_LARGEST_FILE = 1 << 30


@dataclass(frozen=True)
class Run:
    """One network, trained from one seed.

    `losses` are the mean training losses of the epochs. `loss` and `accuracy` are those of the training images at the
    end, `test_accuracy` that of the held-out ones. They are measured in eval mode, with BatchNorm's statistics computed
    once more over all training images, as the running ones lag behind after a short training.
    """

    network: str
    seed: int
    losses: list[float]
    loss: float
    accuracy: float
    test_accuracy: float


class Work:
    """What a run of an experiment has done so far, in a folder; None: nothing is kept.

    One process at a time works in a folder. What another version, other settings, another backend or another number of
    threads left there does not count. Files with other names than ours stay.

    Args:
        settings: all that the result depends on, as JSON types.
        keeps_weights: of finished runs.

    Raises:
        AnalysisError: another process works in the folder.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], keeps_weights: bool = False) -> None:
        self.folder, self.keeps_weights = folder, keeps_weights
        made_by = {
            "fusedres": __version__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "backend": backend_for("cpu"),
            "settings": settings,
        }
        self._made_by = json.loads(json.dumps(made_by))
        self._runs: dict[str, Any] = {}
        self._lock: int | None = None
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise AnalysisError(f"analyze: one process at a time can work in {folder}; choose another --out") from error
        found = _parsed(self._read(_RUNS))
        if found.get("made_by") == self._made_by:
            self._runs = found["runs"]

    def __enter__(self) -> Work:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes work in the folder."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def run(self, key: str) -> Run | None:
        """Return a finished run."""
        return Run(**self._runs[key]) if key in self._runs else None

    def finish(self, key: str, run: Run) -> None:
        """Keep a finished run."""
        self._runs[key] = asdict(run)
        self._write(_RUNS, json.dumps({"made_by": self._made_by, "runs": self._runs}).encode())

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Keep the state of training."""
        if self.folder is not None:
            data = io.BytesIO()
            torch.save({"made_by": json.dumps(self._made_by), "state": state}, data)
            self._write(f"{_PREFIX}{name}.pt", data.getvalue())

    def load(self, name: str) -> Any:
        """Return a state that was kept, or None."""
        data = self._read(f"{_PREFIX}{name}.pt")
        if data is None:
            return None
        try:
            found = torch.load(io.BytesIO(data), weights_only=True)
            return found["state"] if found["made_by"] == json.dumps(self._made_by) else None
        except Exception:  # a damaged file may raise anything; the run starts again
            return None

    def _read(self, name: str) -> bytes | None:
        try:
            return None if self.folder is None else files.read(self.folder / name, _LARGEST_FILE)
        except OSError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        if self.folder is not None:
            files.write(self.folder / name, data)


def remove(folder: Path) -> None:
    """Remove what runs have left in a folder; and the folder, and the one above it, if they are empty then."""
    with contextlib.suppress(OSError):
        for left in [*folder.glob(f"{_PREFIX}*"), *folder.glob(f".{_PREFIX}*.unfinished")]:
            left.unlink(missing_ok=True)
        folder.rmdir()
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


def _parsed(data: bytes | None) -> dict[str, Any]:
    """Return what a file of finished runs holds; of a damaged one nothing."""
    try:
        found = json.loads(data or b"{}")
        runs = {key: asdict(Run(**run)) for key, run in found["runs"].items()}
    except Exception:
        return {}
    return {"made_by": found.get("made_by"), "runs": runs}
