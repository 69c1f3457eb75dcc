"""Rows on disk, one JSON object a line, appended whole: whoever is killed loses nothing that was written.

Every line has a `step`. A case begins with {"case", "event": "start", "limit"} and ends with an event of ENDS; in
between come its rows, which have no event, and {"event": "trying", "what"}: after a {"event": "crash"} a case goes on
behind what it died of. {"event": "end", "why"} closes a step.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

ENDS = ("done", "failed", "crashed", "hung")
LARGEST = 15 << 20  # bytes of a file

Row = dict[str, Any]


class Journal:
    """The file of one step."""

    def __init__(self, folder: Path, step: str) -> None:
        self.path, self.step = folder / f"{step}.jsonl", step

    def append(self, **fields: Any) -> None:
        """One line in one write, after a line that a kill may have cut."""
        line = json.dumps({"step": self.step} | _plain(fields), ensure_ascii=False, default=str) + "\n"
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size + len(line) > LARGEST and "event" not in fields:
                return
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = "\n" + line
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def size(self) -> int:
        """Bytes."""
        return self.path.stat().st_size if self.path.exists() else 0

    def lines(self, size: int | None = None) -> list[Row]:
        """Every whole line; those of the first `size` bytes."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_bytes()[:size].decode(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:  # cut by a kill
                continue
        return [row for row in found if isinstance(row, dict)]

    def rows(self, size: int | None = None) -> list[Row]:
        """What was measured or found, without events; of the first `size` bytes."""
        return [row for row in self.lines(size) if "event" not in row]

    def finished(self) -> bool:
        """Whether the step ran to its end."""
        return any(row.get("event") == "end" and row.get("why") == "finished" for row in self.lines())

    def ended(self) -> set[str]:
        """Cases that need not run again."""
        return {row["case"] for row in self.lines() if row.get("event") in ENDS}

    def poison(self) -> set[str]:
        """What was being tried when the step's process died."""
        found, last = set(), None
        for row in self.lines():
            if row.get("event") == "trying":
                last = row["what"]
            elif row.get("event") == "crash" and last is not None:
                found.add(last)
                last = None
        return found

    def running(self) -> Row | None:
        """The start of a case that has not ended; none where the process has."""
        last = None
        for row in self.lines():
            if row.get("event") == "start":
                last = row
            elif row.get("event") in (*ENDS, "crash"):
                last = None
        return last


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
