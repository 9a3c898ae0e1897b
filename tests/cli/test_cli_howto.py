"""docs/howto/add-a-command.md does what it says: its file is put beside the others and is a command like them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megapar.cli.command import commands
from megapar.config.keys import keys
from tests.cli.conftest import clean_environment

GUIDE = Path(__file__).parents[2] / "docs" / "howto" / "add-a-command.md"
TEXT = GUIDE.read_text()
(SOURCE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)

# Puts a folder (the first argument) behind those where commands are found, then runs a command line (the others).
FOUND_TOO = """
import sys
from megapar.cli import commands, main
commands.__path__.append(sys.argv[1])
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def done(tmp_path: Path):
    """Run a command line where the guide's command exists, in tmp_path."""
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tail.py").write_text(SOURCE)

    def run(line: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-c", FOUND_TOO, str(tmp_path / "more"), *line.split()]
        return subprocess.run(words, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True)

    return run


def test_the_file_is_all_it_takes(done, tmp_path: Path) -> None:
    overview = done("--help").stdout
    assert re.search(r"^  bench overlap .*\n  tail +print the last steps of a run$", overview, re.MULTILINE)
    of_its_own = done("tail --help").stdout
    assert "usage: megapar tail [RUN] " in of_its_own and "  steps    steps to print\n" in of_its_own
    assert "steps: 7" in done("tail --info config steps=7").stdout

    (command,) = re.findall(r"\nmegapar (tail .*?)\n", TEXT)
    (shown,) = re.findall(r"```\n( +\d+ [\d.]+\n.*?)```", TEXT, re.DOTALL)
    folder = tmp_path / "runs" / "demo"
    folder.mkdir(parents=True)
    rows = [{"step": 118, "loss": 3.9}, {"step": 119, "loss": 3.95123}, {"step": 120, "loss": 3.94471}]
    lines = [*map(json.dumps, rows), json.dumps({"step": 120, "val_loss": 4.0})]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert done(command).stdout == shown


def test_its_mistakes_are_one_line(done) -> None:
    (shown,) = re.findall(r"\n(run\.dir=nowhere: .*)\n", TEXT)
    for line, words in {
        "tail nowhere": shown,
        "tail steps=0 x": "x: not an override; write key=value",
        "tail steps=0": "steps=0: must be at least 1",
        "tail step=1": "step=1: unknown key; did you mean steps?",
        "tail x=1": "x=1: unknown key; `megapar tail --info config` lists the keys",
        "tails": "tails: unknown command; did you mean tail?",
        "tail -m steps=1,2": "-m: `megapar tail` runs once; sweeps are for train",
    }.items():
        refused = done(line)
        assert (refused.returncode, refused.stderr.strip()) == (2, words)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:megapar|tests|conf)/[\w/.]+)`", TEXT))))
def test_files_that_it_names_exist(name: str) -> None:
    assert (GUIDE.parents[2] / name).exists() or name in ("megapar/cli/commands/tail.py", "conf/NAME.yaml")


@pytest.mark.parametrize("name", commands())
def test_what_a_command_names_are_its_keys(name: str) -> None:
    command = commands()[name]
    known = keys(command.config)
    assert {*command.own, *command.most_used} <= set(known)
    assert all(known[key].verbatim for key in command.positionals)  # a folder's name is not Hydra's grammar
