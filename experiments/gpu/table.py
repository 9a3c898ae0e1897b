"""The rows of a run: what one holds, the file of all, and the summary at the end."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
KINDS = ("measured", "rehearsed", "static", "skipped")
FIGURES = ("TFLOP/s", "GB/s", "tokens/s", "of 989 TFLOP/s", "GB", "ms a step", "x")


def row_of(section: str, check: str, ok: bool | None, kind: str, **others: Any) -> Row:
    """A row with every key. A skipped one has a `reason` too."""
    row: Row = {"section": section, "check": check, "ok": ok, "value": None, "unit": "", "floor": None}
    row |= {"floor_met": None, "kind": kind, "device": "", "versions": {}, "note": ""} | others
    row["value"], row["floor"] = number(row["value"]), number(row["floor"])
    return row


def skipped(section: str, check: str, reason: str, **others: Any) -> Row:
    return row_of(section, check, None, "skipped", reason=reason, **others)


def number(value: Any) -> Any:
    """As JSON holds it: five digits, and text for what is not finite."""
    if value is None or isinstance(value, int | str):
        return value
    value = float(value)
    return float(f"{value:.5g}") if math.isfinite(value) else str(value)


def line_of(row: Row) -> str:
    """What the terminal says of a row."""
    parts = [f"{row['section']}: {row['check']}"]
    if row["value"] is not None:
        parts.append(f"{row['value']} {row['unit']}".rstrip())
    if row["floor"] is not None:
        parts.append(f"[floor {row['floor']}]")
    return f"{word_of(row):<5} " + "  ".join([*parts, *filter(None, [row.get("reason", ""), row["note"]])])


def word_of(row: Row) -> str:
    if row["ok"] is None:
        return "skip"
    return "WRONG" if not row["ok"] else "below" if row["floor_met"] is False else "ok"


class RowFile:
    """DIR/accept.json, a list, whole at every moment: it is written anew beside its place and renamed."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, list[Row]()
        self.write()

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.write()
        print(line_of(row), flush=True)

    def write(self) -> None:
        beside = self.path.with_suffix(".tmp")
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        beside.write_text(f"[\n{lines}\n]\n" if lines else "[]\n")
        os.replace(beside, self.path)


def read_rows(path: Path) -> list[Row]:
    return json.loads(path.read_text()) if path.exists() else []


def summary(rows: Iterable[Row], seconds: dict[str, float]) -> str:
    """Counts by section, then what was wrong, what missed its floor, and the figures."""
    rows = list(rows)
    lines = ["", f"{'section':<14}" + "".join(f"{word:>6}" for word in ("ok", "WRONG", "below", "skip", "s"))]
    for name in dict.fromkeys(row["section"] for row in rows):
        words = [word_of(row) for row in rows if row["section"] == name]
        counts = [words.count(word) for word in ("ok", "WRONG", "below", "skip")]
        lines.append(f"{name:<14}" + "".join(f"{count:>6}" for count in (*counts, round(seconds.get(name, 0)))))
    figures = [row for row in rows if row["unit"] in FIGURES and row["value"] is not None and word_of(row) == "ok"]
    groups = {
        "wrong": ([row for row in rows if word_of(row) == "WRONG"], 40),
        "below the floor": ([row for row in rows if word_of(row) == "below"], 30),
        "figures": (figures, 60),
    }
    for title, (mine, room) in groups.items():
        lines += [f"{title}: {len(mine)}"] if mine else []
        lines += [f"  {line_of(row)[6:150]}" for row in mine[:room]]
        lines += [f"  and {len(mine) - room} more in accept.json"] if len(mine) > room else []
    return "\n".join(lines)
