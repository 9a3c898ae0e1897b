"""The table of a sweep: its points, what became of them and how they ended."""

import csv
import io
from pathlib import Path
from typing import Any

from megapar.launch import rundir

NUMBERS = ("loss", "val_loss", "tokens_per_s")


def results(folder: Path) -> dict[str, Any]:
    """What the table shows of a finished point, from its summary.json: loss, val_loss (the last), tokens_per_s."""
    summary = rundir.read_json(folder / "summary.json")
    evaluations = summary.get("evaluations") or [{}]
    found = {"loss": summary.get("loss"), "val_loss": evaluations[-1].get("val_loss")}
    return found | {"tokens_per_s": summary.get("tokens_per_s")}


def table(folder: Path, rows: dict[str, dict[str, Any]]) -> str:
    """The points of a sweep, one a line: state, final loss, speed, seconds, what sets it apart."""
    common = set.intersection(*(set(row["overrides"]) for row in rows.values())) if len(rows) > 1 else set()
    lines = [f"{'point':<10}  {'state':<11}  {'loss':>8}  {'val_loss':>8}  {'tokens/s':>9}  {'seconds':>7}  overrides"]
    for name, row in rows.items():
        found = results(folder / name) if row["state"] == "done" else {}
        numbers = [
            _number(found.get("loss"), ".4f", 8),
            _number(found.get("val_loss"), ".4f", 8),
            _number(found.get("tokens_per_s"), ",.0f", 9),
            _number(row.get("seconds"), ".1f", 7),
        ]
        own = " ".join(override for override in row["overrides"] if override not in common)
        lines.append(f"{name:<10}  {row['state']:<11}  {'  '.join(numbers)}  {own}")
        if row.get("error"):
            lines.append(f"{'':<10}  {row['error']}")
    counts = {state: sum(row["state"] == state for row in rows.values()) for state in ("done", "failed", "interrupted")}
    skipped = sum(bool(row.get("skipped")) for row in rows.values())
    total = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return "\n".join(
        [*lines, f"{total}{f' ({skipped} of them before)' if skipped else ''}; ledger: {folder}/ledger.jsonl"]
    )


def as_csv(folder: Path, rows: dict[str, dict[str, Any]]) -> str:
    """The same for a spreadsheet: a column for every figure, and one for every key that was set for a point."""
    settings = {name: dict(text.partition("=")[::2] for text in row["overrides"]) for name, row in rows.items()}
    names = dict.fromkeys(key for point in settings.values() for key in point)
    file = io.StringIO()
    writer = csv.DictWriter(file, ["point", "state", *NUMBERS, "seconds", "error", *names], lineterminator="\n")
    writer.writeheader()
    for name, row in rows.items():
        found = results(folder / name) if row["state"] == "done" else {}
        own = {key: row.get(key) for key in ("state", "seconds", "error")}
        writer.writerow({"point": name} | own | found | settings[name])
    return file.getvalue()


def states_now(folder: Path, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of a ledger, with what was killed while it ran as interrupted."""
    return {
        name: row | {"state": "interrupted"} if row["state"] == "running" and not rundir.is_held(folder / name) else row
        for name, row in rows.items()
    }


def _number(value: Any, form: str, width: int) -> str:
    return f"{value:>{width}{form}}" if isinstance(value, int | float) else f"{'-':>{width}}"
