"""A run's command typed again: it goes on in place, or says why not; nothing is lost without a word."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapar.checkpoint import find_checkpoint, read_manifest
from megapar.cli import main
from megapar.config.file import load_config
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import HANG_S, wait_for
from tests.tiny import VOCABULARY, write_tokens

TINY = ["model.layers=2", "model.hidden=16", "model.heads=4", f"model.vocab_size={VOCABULARY}", "data.split=0.2"]
TINY += ["train.seq_length=8", "train.global_batch_size=8", "train.steps=6", "checkpoint.every=2", "train.dtype=fp64"]
TINY += ["train.eval_every=2", "train.eval_samples=4", "logger.wandb.mode=disabled", "optim.lr=1e-2"]
STOPS = "stubs:stops_behind_3"
FIGURES = ("step", "loss", "grad_norm", "lr", "tokens", "skipped_steps", "val_loss")


def rows(folder: Path) -> list[dict[str, Any]]:
    """What must not depend on interruptions, of every row."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: row[key] for key in FIGURES if key in row} for row in map(json.loads, lines)]


def steps(folder: Path, figure: str = "loss") -> list[int]:
    return [row["step"] for row in rows(folder) if figure in row]


def state(folder: Path) -> dict[str, bytes]:
    """The files of the newest checkpoint."""
    return {path.name: path.read_bytes() for path in find_checkpoint(folder).glob("*.safetensors")}


class Typed:
    """Commands typed in a terminal."""

    def __init__(self, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.tokens, self.capsys = tokens, capsys

    def __call__(self, folder: Path, *overrides: str, entry: str | None = None) -> tuple[int, list[str]]:
        """The exit code of `megapar train` in a run directory, and the lines that it says on standard error."""
        self.capsys.readouterr()
        code = main(["train", *TINY, f"data.path={self.tokens}", f"run.dir={folder}", *overrides], entry=entry)
        return code, self.capsys.readouterr().err.strip().splitlines()


@pytest.fixture
def typed(tokens: str, capsys: pytest.CaptureFixture[str]) -> Typed:
    return Typed(tokens, capsys)


@pytest.fixture(scope="module")
def whole(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", *TINY, f"data.path={tokens}", f"run.dir={folder}"]) == 0
    return folder


def test_an_interrupted_run_goes_on_bit_for_bit(typed: Typed, whole: Path, tmp_path: Path) -> None:
    """Every row and the last checkpoint; the summary is of the whole run; then it is finished, and stays as it is."""
    folder = tmp_path / "run"
    code, said = typed(folder, entry=STOPS)
    assert code == 85 and said[-2] == "interrupted"
    assert steps(folder) == [1, 2, 3] and find_checkpoint(folder).name == "step-00000003"
    assert not (folder / "summary.json").exists()
    words = shlex.split(said[-1])
    assert words[:2] == ["megapar", "train"]

    typed.capsys.readouterr()
    assert main(words[1:]) == 0
    said = typed.capsys.readouterr().err.strip().splitlines()
    assert f"run: goes on from step 3 of 6, which {folder}/checkpoints/step-00000003 has" in said
    assert rows(folder) == rows(whole) and state(folder) == state(whole)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
    for key in ("steps", "loss", "evaluations", "skipped_steps"):
        assert one[key] == other[key], key
    assert load_config(folder).checkpoint.load is None  # it is still the run that it was

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, said = typed(folder, f"out={tmp_path}/copy.json")
    assert code == 0 and said[-1].startswith(f"run: {folder} is finished: 6 steps are done; more train.steps make it")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert (tmp_path / "copy.json").read_bytes() == (folder / "summary.json").read_bytes()


@pytest.mark.more
@pytest.mark.parametrize(("first", "then"), [("tp2", "tp2"), ("dp2", "pp2")])
def test_it_goes_on_in_any_layout(first: str, then: str, typed: Typed, tmp_path: Path) -> None:
    """All ranks stop after the same step. In the same layout bits are the same, in another one the losses."""
    assert typed(tmp_path / "whole", f"parallel={first}")[0] == 0
    folder = tmp_path / "run"
    assert typed(folder, f"parallel={first}", entry=STOPS)[0] == 85
    code, said = typed(folder, f"parallel={then}", "logger.csv=true", "optim.weight_decay=0.1")
    assert code == 0
    if first == then:
        assert "run: changed since: logger.csv false -> true" in said
        assert rows(folder) == rows(tmp_path / "whole") and state(folder) == state(tmp_path / "whole")
    else:
        assert "run: changed since: parallel.pp 1 -> 2, parallel.dp 2 -> 1, logger.csv false -> true" in said
        for row, expected in zip(rows(folder), rows(tmp_path / "whole"), strict=True):
            assert row == pytest.approx(expected, rel=1e-10)
    assert len((folder / "steps.csv").read_text().splitlines()) == 1 + 6  # rows of the first start, too


@pytest.mark.more
def test_ctrl_c_writes_a_checkpoint(tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent to all processes, as a terminal does. The last line is the command that goes on, also without a run.dir."""
    line = [sys.executable, "-m", "megapar.cli", "train", *TINY, f"data.path={tokens}", "parallel=dp2"]
    line += ["train.steps=100000", "checkpoint.every=0", "train.eval_every=0", "run.name=it's mine"]
    pipe = subprocess.PIPE
    launcher = subprocess.Popen(
        line, cwd=tmp_path, env=clean_environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    assert wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("runs/*/metrics.jsonl")), HANG_S)
    os.killpg(launcher.pid, signal.SIGINT)
    out, err = launcher.communicate(timeout=HANG_S)
    assert launcher.returncode == 85 and "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    done = read_manifest(find_checkpoint(folder)).step
    assert steps(folder) == list(range(1, done + 1)) and f"step {done:>6}  interrupted; " in out
    said = err.splitlines()
    assert said[-3:-1] == ["stopping after this step, with a checkpoint; Ctrl-C again: at once", "interrupted"]
    words = shlex.split(said[-1])
    assert (
        words[:2] == ["megapar", "train"]
        and words[-1] == f"run.dir=runs/{folder.name}"
        and "run.name=it's mine" in words
    )
    monkeypatch.chdir(tmp_path)
    assert main([*words[1:], f"train.steps={done + 2}"]) == 0
    assert steps(folder) == list(range(1, done + 3))


def test_a_second_ctrl_c_ends_at_once(start: Callable, tmp_path: Path) -> None:
    """Ranks listen and never come to the end of their step."""
    launcher = start("listens_and_sleeps", "parallel=dp2", "run.dir=run")
    assert wait_for(lambda: len(list((tmp_path / "run").glob("pid-*"))) == 2, HANG_S)
    launcher.send_signal(signal.SIGINT)
    time.sleep(1)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    _, err = launcher.communicate(timeout=HANG_S)
    assert launcher.returncode == 130 and err.splitlines()[-1] == "interrupted"


def test_a_longer_run_says_what_becomes_of_the_learning_rate(typed: Typed, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert typed(folder, "train.steps=2")[0] == 0
    code, said = typed(folder, "train.steps=4", "optim.lr=2e-2")
    assert code == 0
    assert "run: changed since: optim.lr 0.01 -> 0.02, train.steps 2 -> 4" in said
    end = "run: the learning rate's curve now ends at step 4 with 0.002; it ended at step 2 with 0.001"
    assert end in said
    assert steps(folder) == [1, 2, 3, 4] and steps(folder, "val_loss") == [0, 2, 4]
    code, said = typed(folder, "train.steps=3", "optim.lr=2e-2")
    assert code == 2 and said[-1].startswith(f"train.steps=3: {folder} has done 4 steps already; use more, choose")


def test_another_run_is_refused(typed: Typed, whole: Path, tmp_path: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    for override, shown in {
        "model.hidden=32": "model.hidden 16 -> 32",
        "model.dropout=0.1": "model.dropout 0.0 -> 0.1",
        "train.seed=5": "train.seed 1234 -> 5",
        "train.dtype=fp32": "train.dtype fp64 -> fp32",
        "train.seq_length=4": "train.seq_length 8 -> 4",
        f"data.path={write_tokens(tmp_path, seed=1)}": f" -> {tmp_path}/tokens",
        f"checkpoint.weights={whole}/elsewhere": f"checkpoint.weights null -> {whole}/elsewhere",
    }.items():
        code, said = typed(whole, override, "train.steps=8")
        assert code == 2, override
        assert said[-1].startswith(
            f"run.dir={whole}: holds a run that does not go on with other values (saved -> now): "
        )
        assert shown in said[-1] and said[-1].endswith("or train.resume=never, which moves what is there aside")
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.more
def test_the_same_data_elsewhere_are_the_same(typed: Typed, tmp_path: Path) -> None:
    """By their hash; and other data in the same place are not."""
    (tmp_path / "moved").mkdir()
    write_tokens(tmp_path / "moved")
    folder, moved = tmp_path / "run", f"data.path={tmp_path}/moved/tokens"
    assert typed(folder, entry=STOPS)[0] == 85
    assert typed(folder, moved)[0] == 0
    for path in (tmp_path / "moved").iterdir():
        path.unlink()
    write_tokens(tmp_path / "moved", seed=1)
    code, said = typed(folder, moved, "train.steps=8")
    assert code == 2 and f"the tokens of data.path={tmp_path}/moved/tokens, by SHA-256 " in said[-1]


def test_never_moves_what_is_there_aside(typed: Typed, tmp_path: Path) -> None:
    """All that the run has written, and nothing else."""
    folder = tmp_path / "run"
    assert typed(folder, "train.steps=2", "logger.csv=true")[0] == 0
    (folder / "notes.txt").write_text("mine")
    left = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, said = typed(folder, "train.steps=2", "train.resume=never", "model.hidden=32")
    assert code == 0 and f"run: {folder}: what was there is moved aside" in said
    assert steps(folder) == [1, 2] and load_config(folder).model.hidden == 32
    for path in left:
        here = path.name in (".lock", "notes.txt")
        assert (folder / path if here else folder / "before-1" / path).read_bytes() == left[path], path
    assert not (folder / "before-1" / "notes.txt").exists()
    code, said = typed(folder, "train.resume=never", "model.hidden=32", f"checkpoint.load={folder}")
    assert code == 2 and "train.resume=never would move it aside" in said[-1]


@pytest.mark.more
def test_going_back_keeps_what_came_after(typed: Typed, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert typed(folder)[0] == 0
    back = f"checkpoint.load={folder}/checkpoints/step-00000002"
    code, said = typed(folder, back, "optim.lr=2e-2", entry=STOPS)
    assert code == 85 and "run: goes back to step 2; what came after it is moved aside" in said
    assert "run: changed since: optim.lr 0.01 -> 0.02" in said
    aside = folder / "before-1"
    assert rows(aside) == rows(whole) and (aside / "checkpoints" / "step-00000006").exists()
    assert find_checkpoint(folder).name == "step-00000003"
    code, said = typed(folder, back, "optim.lr=2e-2")  # the same command again goes on
    assert code == 0 and any(line.startswith("run: goes on from step 3 of 6") for line in said)
    assert steps(folder) == [1, 2, 3, 4, 5, 6] and rows(folder)[:4] == rows(whole)[:4]
    assert rows(folder) != rows(whole)


@pytest.mark.more
def test_a_run_without_a_checkpoint_starts_anew_and_says_so(typed: Typed, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    assert typed(folder, "train.steps=2", "checkpoint.every=0")[0] == 0
    for path in (folder / "checkpoints").glob("step-*"):
        path.rename(tmp_path / path.name)
    code, said = typed(folder, "train.steps=2", "checkpoint.every=0")  # its checkpoints were removed to make room
    assert code == 0 and "is finished: 2 steps are done" in said[-1] and steps(folder) == [1, 2]
    code, said = typed(folder, "train.steps=3", "checkpoint.every=0")
    assert code == 2 and "is finished and has no checkpoint left to go on from" in said[-1]
    (folder / "summary.json").unlink()
    code, said = typed(folder, "train.steps=2", "checkpoint.every=0")
    assert code == 2 and "its checkpoints are gone, though checkpoints/latest names step-00000002" in said[-1]
    assert steps(folder) == [1, 2]
    (folder / "checkpoints/latest").unlink()
    code, said = typed(folder, "train.steps=2", "checkpoint.every=0")
    assert code == 0 and f"run: {folder}: was interrupted before its first checkpoint, so it starts anew" in said
    assert steps(folder) == [1, 2]


@pytest.mark.more
def test_a_damaged_checkpoint_is_passed_over(typed: Typed, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert typed(folder, entry=STOPS)[0] == 85
    (path,) = (folder / "checkpoints" / "step-00000003").glob("*.safetensors")
    good = path.read_bytes()
    path.write_bytes(bytes([*good[:-1], good[-1] ^ 1]))
    code, said = typed(folder)
    assert code == 0
    assert f"run: {path}: changed, its SHA-256 is not the one in the manifest; use another checkpoint" in said
    assert "run: what came after step 2 is moved aside" in said
    assert any(line.startswith("run: goes on from step 2 of 6") for line in said)
    assert rows(folder) == rows(whole) and state(folder) == state(whole)
    (aside,) = (folder / "before-1" / "checkpoints").iterdir()  # kept, and no checkpoint of the run any more
    assert aside.name == "step-00000003" and steps(folder / "before-1") == [1, 2, 3]


@pytest.mark.more
def test_a_run_killed_before_its_summary_gets_one(typed: Typed, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert typed(folder)[0] == 0
    (folder / "summary.json").unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # and in the middle of a line
    assert typed(folder)[0] == 0
    assert rows(folder) == rows(whole)
    one, other = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
    assert all(one[key] == other[key] for key in ("steps", "loss", "evaluations"))


@pytest.mark.more
def test_old_checkpoints_are_removed(typed: Typed, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert typed(folder, "checkpoint.every=1", "checkpoint.keep=2")[0] == 0
    left = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert left == ["latest", "step-00000005", "step-00000006"]
    assert rows(folder) == rows(whole)


def test_weights_alone(typed: Typed, whole: Path, tmp_path: Path) -> None:
    """With another order of the data: the evaluation before the first step is the old run's last, step and optimizer
    are new. The same command again goes on with its own state, not with the weights."""
    folder, other = tmp_path / "run", [f"checkpoint.weights={whole}", "train.seed=7"]
    assert typed(folder, *other, entry=STOPS)[0] == 85
    assert steps(folder) == [1, 2, 3]
    assert rows(folder)[0] == {"step": 0, "val_loss": rows(whole)[-1]["val_loss"]}
    manifest = read_manifest(find_checkpoint(folder))
    assert (manifest.step, manifest.optimizer_steps) == (3, 3)
    code, said = typed(folder, *other)
    assert code == 0 and any(line.startswith("run: goes on from step 3 of 6") for line in said)
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


def test_weights_that_do_not_fit_are_refused(typed: Typed, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for overrides, words in {
        "model.layers=3": ["model.layers=3: ", "was trained with 2"],
        "model.vocab_size=80": ["model.vocab_size=80: ", f"was trained with {VOCABULARY}"],
        f"checkpoint.load={whole}": ["checkpoint.weights=", "checkpoint.load takes all"],
    }.items():
        code, said = typed(folder, f"checkpoint.weights={whole}", overrides)
        assert code == 2 and said[-1].startswith(words[0]) and words[1] in said[-1], said
        assert not folder.exists()
    code, said = typed(folder, "checkpoint.weights=/nodir")
    assert code == 2 and said[-1].startswith("checkpoint.weights=/nodir: /nodir: no such folder")
