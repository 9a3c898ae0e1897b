"""Which statements of `experiments/gpu` a rehearsal must reach, and which it did."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "gpu"
# A script, of which each line runs or none; other commands, which have their own tests.
ELSEWHERE = ("accept.py", "report.py", "tune.py", "pin.py", "alternatives.py")
CARD_ONLY = "# card-only"


def files() -> list[Path]:
    return [path for path in sorted(FOLDER.rglob("*.py")) if path.name not in ELSEWHERE]


def statements(path: Path) -> dict[int, tuple[bool, bool]]:
    """{line on which a statement begins: (whether the file says that only a card reaches it, whether it has a body)}

    A comment on the line of a statement that has a body speaks for the body too.
    """
    text = path.read_text()
    return dict(_walk(ast.parse(text).body, text.splitlines(), False))


def _walk(body: list[ast.stmt], lines: list[str], card_only: bool) -> Iterator[tuple[int, tuple[bool, bool]]]:
    for one in body:
        if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant):
            continue
        parts = [(getattr(one, name, []), one.lineno) for name in ("body", "orelse", "finalbody")]
        parts += [(handler.body, handler.lineno) for handler in getattr(one, "handlers", [])]
        begins = [part[0].lineno for part, _ in parts if part]
        last = min(begins) - 1 if begins else one.end_lineno or one.lineno
        mine = card_only or any(CARD_ONLY in line for line in lines[one.lineno - 1 : max(last, one.lineno)])
        yield one.lineno, (mine, bool(begins))
        for part, line in parts:
            yield from _walk(part, lines, card_only or CARD_ONLY in lines[line - 1])


def reached(notes: Path) -> set[tuple[str, int]]:
    """(file, line) of what the plugin noted."""
    found = set()
    for line in set(notes.read_text().splitlines()):
        path, _, number = line.rpartition(":")
        found.add((path, int(number)))
    return found


def report(notes: Path) -> tuple[float, list[str], list[str]]:
    """(share of all statements that were reached, those that were not and don't say why, those that say it wrongly)"""
    seen, total, missed, silent, wrong = reached(notes), 0, 0, [], []
    for path in files():
        for line, (card_only, has_body) in statements(path).items():
            there, place = (str(path), line) in seen, f"{path.relative_to(ROOT)}:{line}"
            total += 1
            missed += not there
            silent += [place] if not there and not card_only else []
            wrong += [place] if there and card_only and not has_body else []
    return 1 - missed / total, silent, wrong
