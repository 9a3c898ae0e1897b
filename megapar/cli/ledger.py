"""What became of each point of a sweep: one JSON object per change of state, only ever appended."""

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

State = Literal["running", "done", "failed", "interrupted"]


class Ledger:
    """`ledger.jsonl` in a sweep's folder. Several processes may append at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.jsonl"

    def append(self, point: str, state: State, **details: Any) -> None:
        """Add a line: the point's id, its new state, and what else is worth knowing."""
        row = {"point": point, "state": state, "time": datetime.now(UTC).isoformat(timespec="seconds")} | details
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell() and _last_byte(file.fileno()) != b"\n":
                file.write(b"\n")  # a writer was killed in the middle of its line
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def latest(self) -> dict[str, dict[str, Any]]:
        """The last line of each point, by id. Lines that a crash left incomplete, or none of ours, are skipped."""
        rows: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            return rows
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and "state" in row and "point" in row:
                rows[row["point"]] = row
        return rows


def _last_byte(handle: int) -> bytes:
    size = os.fstat(handle).st_size
    return os.pread(handle, 1, size - 1)
