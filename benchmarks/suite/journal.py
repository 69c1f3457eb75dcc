"""Rows in a file with one JSON object per line. Each line is appended in one write, so a kill loses no written row.

Every line has a `step`. A case begins with {"case", "event": "start", "limit"} and ends with one of the events ENDS.
Between these are its rows, which have no event, and lines {"event": "trying", "what"}. After a crash, which is
{"event": "crash"}, a case continues and skips what it tried last. {"event": "end", "why"} closes a step.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

ENDS = ("done", "failed", "crashed", "hung")
LARGEST = 15 << 20  # bytes of a file; later rows are dropped

Row = dict[str, Any]


class Journal:
    """The file of one step."""

    def __init__(self, folder: Path, step: str) -> None:
        self.path, self.step = folder / f"{step}.jsonl", step

    def append(self, **fields: Any) -> None:
        """Append one line in one write; first end a line that a kill has cut."""
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
        """Return the bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def lines(self, size: int | None = None) -> list[Row]:
        """Return every complete line of the first `size` bytes (default: of the whole file)."""
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
        """Return the rows, without events, of the first `size` bytes (default: of the whole file)."""
        return [row for row in self.lines(size) if "event" not in row]

    def finished(self) -> bool:
        """Whether the step has finished."""
        return any(row.get("event") == "end" and row.get("why") == "finished" for row in self.lines())

    def ended(self) -> set[str]:
        """Return the cases that need not run again."""
        return {row["case"] for row in self.lines() if row.get("event") in ENDS}

    def poison(self) -> set[str]:
        """Return what was being tried when the process of the step died."""
        found, last = set(), None
        for row in self.lines():
            if row.get("event") == "trying":
                last = row["what"]
            elif row.get("event") == "crash" and last is not None:
                found.add(last)
                last = None
        return found

    def running(self) -> Row | None:
        """Return the start line of the case that runs; None if no case runs or the process has crashed."""
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
