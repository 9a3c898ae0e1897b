"""docs/howto/add-a-schedule.md does what it says: its file is put beside the others, found, proven and compared."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "howto" / "add-a-schedule.md"
TEXT = GUIDE.read_text()
(SOURCE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

# Puts a folder (the first argument) before those where schedules are found, then runs a command line (the others).
FOUND_TOO = """
import sys
from megapar.cli import main
from megapar.schedule import generators
generators.__path__.insert(0, sys.argv[1])
"""

PROMISES = """
from megapar.schedule.build import build
from megapar.schedule.check import check
from megapar.schedule.simulate import simulate
from tests.schedule.test_generators import prove
for p in range(1, 6):
    for m in (1, 3, p, 4 * p):
        prove("grouped", p, m, 1)
    schedule = build("grouped", p, 4 * p)
    assert max(check(schedule).in_flight) == p
    assert abs(simulate(schedule).mean_bubble - (p - 1) / (2 * p - 1)) < 1e-9
"""


def run(folder: Path, command: str, more: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{FOUND_TOO}{more}\nsys.exit(main(sys.argv[2:]))"
    words = [sys.executable, "-c", code, str(folder), *command.split()]
    return subprocess.run(words, capture_output=True, text=True, cwd=GUIDE.parents[2])


def test_the_worked_example_keeps_its_promises(tmp_path: Path) -> None:
    (tmp_path / "grouped.py").write_text(SOURCE)
    (command,) = re.findall(r"\nmegapar (schedule .*?)\n", TEXT)
    done = run(tmp_path, command, PROMISES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split() == ["grouped", "1", "84.00", "42.9%", "42.9%", "4.00", "0.00"]


def test_its_mistake_is_named_as_shown(tmp_path: Path) -> None:
    (shown,) = re.findall(r"\n(pipeline\.schedule=grouped: .*)\n", TEXT)
    (tmp_path / "grouped.py").write_text(SOURCE.replace('"FB"', '"BF"'))
    done = run(tmp_path, "schedule pipeline.schedule=grouped stages=4")
    assert (done.returncode, done.stderr.strip()) == (2, shown)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(megapar/[\w/.]+|tests/[\w/.]+)`", TEXT))))
def test_files_that_it_names_exist(name: str) -> None:
    assert (GUIDE.parents[2] / name).exists() or name.endswith("grouped.py")
