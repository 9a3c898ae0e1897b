#!/usr/bin/env python3
"""Keep what a card said, and write it into the documentation.

python experiments/gpu/report.py keep DIR    DIR/accept.json of a card -> results/CARD-DATE.json
python experiments/gpu/report.py             results/ -> docs/gpu.md and README.md, between their markers
"""

import json
import re
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.gpu.table import Row, read_rows, word_of  # noqa: E402

RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- gpu figures: begin, by experiments/gpu/report.py -->", "<!-- gpu figures: end -->"
NOBODY = "No card has run the acceptance yet: there are no figures."
Result = dict[str, Any]  # card, date, command, versions, rows
# What the README shows, if a card has measured it.
CHOSEN = (
    "copy", "bf16 product", "attention forward D128 8B 1x8192", "attention backward D128 8B 1x8192",
    "attention forward D128 8B 1x8192 beside FLASH", "attention forward D128 8B 1x8192 beside cuDNN",
    "product 8B 8192 beside cuBLAS", "product dW into fp32 8B 8192 beside cuBLAS", "rmsnorm 8B 8192", "swiglu 8B 8192",
    "cross entropy statistics 8B 8192", "megapar: tokens", "megapar: MFU", "megapar: GPU idle share of a step",
    "megapar beside plain torch", "megapar beside transformers with torch.compile",
)  # fmt: skip


def main(arguments: list[str]) -> int:
    if not arguments:
        for path, long in ((ROOT / "docs" / "gpu.md", True), (ROOT / "README.md", False)):
            path.write_text(between(path.read_text(), text_of(results(RESULTS), long)))
            print(path)
        return 0
    if arguments[0] == "keep" and len(arguments) == 2:
        try:
            print(keep(Path(arguments[1]), RESULTS))
            return 0
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    print("use: report.py keep DIR, or report.py alone", file=sys.stderr)
    return 2


def keep(out: Path, folder: Path) -> Path:
    """Write a run of a card to `folder`. Raises ValueError for one that there is none of, and for a rehearsal."""
    path = out / "accept.json"
    rows = read_rows(path)
    cards = Counter(row["device"] for row in rows if row["kind"] == "measured" and row["device"] != "cuda")
    if not cards:
        raise ValueError(f"{path}: no card measured anything there; run `make gpu` on one")
    [(card, _)] = cards.most_common(1)
    when = datetime.fromtimestamp(path.stat().st_mtime, UTC)
    command = f"python experiments/gpu/accept.py {rows[0]['note']}"
    result = {"card": card, "date": f"{when:%Y-%m-%d %H:%M} UTC", "command": command, "versions": rows[0]["versions"]}
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    kept = folder / f"{slug}-{when:%Y-%m-%d-%H%M}.json"
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    kept.write_text(json.dumps(result)[:-1] + f', "rows": [\n{lines}\n]}}\n')
    return kept


def results(folder: Path) -> list[Result]:
    """Everything that was kept, the latest first."""
    found = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    return sorted(found, key=lambda one: one["date"], reverse=True)


def between(text: str, new: str) -> str:
    """`text` with what is between its markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"no {BEGIN} ... {END}"
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def text_of(found: list[Result], long: bool) -> str:
    """Markdown: of the latest run of every card all figures (long), or those of the README."""
    latest = list({one["card"]: one for one in reversed(found)}.values())
    return "\n\n".join(part for one in latest for part in parts_of(one, long)) if latest else NOBODY


def parts_of(one: Result, long: bool) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    words = Counter(word_of(row) for row in one["rows"])
    counts = f"{words['ok']} ok, {words['WRONG']} wrong, {words['below']} below their floor, {words['skip']} skipped"
    head = f"**{one['card']}**, {one['date']}; {versions}. `{one['command']}`: {counts}."
    timed = [row for row in one["rows"] if row["kind"] == "measured" and row["unit"] and row["unit"] != "error"]
    if not long:
        shown = [row for name in CHOSEN for row in timed if row["check"] == name]
        return [head, table(shown, ("check", "value", "floor"))]
    parts = [head]
    wrong = [row for row in one["rows"] if word_of(row) == "WRONG"]
    parts += [table(wrong, ("section", "check", "value", "note"))] if wrong else []
    for section in dict.fromkeys(row["section"] for row in timed):
        mine = [row for row in timed if row["section"] == section]
        parts += [f"### {section}", table(mine, ("check", "value", "floor", "note"))]
    return parts


def table(rows: list[Row], columns: tuple[str, ...]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(row, name) for name in columns)} |" for row in rows)])


def cell(row: Row, column: str) -> str:
    """Text of a row under a heading. A floor that was missed says so."""
    if column == "value":
        return "" if row["value"] is None else f"{row['value']} {row['unit']}".strip()
    if column == "floor":
        return "" if row["floor"] is None else f"{row['floor']}" + ", missed" * (row["floor_met"] is False)
    return str(row[column]).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
