"""The run directory: written by one run at a time, each step there once, and what a checkpoint to load must be."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megapar.checkpoint import Manifest
from megapar.cli import main
from megapar.cli.output import refuse_bad_out
from megapar.config import ConfigError, UserError
from megapar.config.keys import changed
from megapar.files import write_atomic
from megapar.launch import resume, rundir
from tests.data.hf import word_like
from tests.tiny import VOCABULARY, tiny_config

FOLDER = "run.dir=run"
SMALL = ["model.layers=2", "model.hidden=16", "model.heads=4", f"model.vocab_size={VOCABULARY}", "data.split=0.2"]
SMALL += ["train.seq_length=8", "train.global_batch_size=8", "train.steps=4", "checkpoint.every=2"]
SMALL += ["train.eval_every=2", "train.eval_samples=4", "logger.wandb.mode=disabled"]


def steps(folder: Path, figure: str = "loss") -> list[int]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if figure in row]


def test_two_runs_do_not_share_a_directory(start: Callable, run: Callable, tmp_path: Path) -> None:
    first = start("sleeps", FOLDER)
    while not (tmp_path / "run" / "pid-0").exists() and first.poll() is None:
        time.sleep(0.05)
    for command in ("train", "verify"):
        second = run("rows", command, FOLDER, *(["layouts=[tp2]"] if command == "verify" else []))
        assert second.code == 2
        line = second.err.strip().splitlines()[-1]
        assert line.startswith("run.dir=run: another run is writing there; ") and "choose another" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert run("rows", "train", FOLDER).code == 0


def test_a_run_without_a_checkpoint_starts_anew(run: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run("rows", "train", FOLDER).code == 0
    for name in (
        "summary.json",
        "trace.json",
        "costs.json",
        "run.svg",
        "checkpoints/latest",
        "logs/rank-7.log",
        "kept.txt",
    ):
        (folder / name).touch()
    (folder / "reference-x").mkdir()  # of a verify that was killed
    again = run("rows", "train", FOLDER)
    assert again.code == 0 and "run: run: was interrupted before its first checkpoint, so it starts anew" in again.err
    assert steps(folder) == [1, 2]
    assert (folder / "logs/rank-0.log").read_text().count("a line of the log") == 1
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"checkpoints/latest", "kept.txt", "run.svg", "config.yaml"} <= left  # the picture is new
    assert not {"summary.json", "trace.json", "costs.json", "logs/rank-7.log"} & left
    assert not (folder / "reference-x").exists()


@pytest.mark.more
def test_an_interrupted_point_starts_anew(run: Callable, start: Callable, tmp_path: Path) -> None:
    sweep = ["-m", "run.dir=sweep", "optim.lr=1,2"]
    first = start("rows_then_sleeps", *sweep)
    while not list((tmp_path / "sweep").glob("*/pid-0")) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    first.communicate()
    assert first.returncode == 85
    assert run("rows", "train", *sweep).code == 0
    assert [steps(path.parent) for path in (tmp_path / "sweep").glob("*/metrics.jsonl")] == [[1, 2], [1, 2]]


@pytest.mark.more
def test_a_checkpoint_to_load(tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real run; what can't be loaded is refused before a directory is made; one of its own takes it back in
    place, and generate is started with it."""
    folder, other = tmp_path / "run", tmp_path / "other"
    whole = ["train", *SMALL, f"data.path={tokens}", f"run.dir={folder}"]
    assert main(whole) == 0
    assert (steps(folder), steps(folder, "val_loss")) == ([1, 2, 3, 4], [0, 2, 4])
    losses = (folder / "metrics.jsonl").read_text().splitlines()

    refused = {
        f"checkpoint.load={folder}": ["train.steps=4", "step-00000004 has done 4 steps already"],
        f"checkpoint.load={folder} train.steps=8 model.hidden=32": ["model.hidden=32", "was trained with 16"],
        f"checkpoint.load={folder} train.steps=8 train.seed=5": ["train.seed=5", "was trained with 1234"],
    }
    for line, words in refused.items():
        capsys.readouterr()
        assert main([*whole[:-1], f"run.dir={other}", *line.split()]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and said[0].startswith(words[0]) and words[1] in said[0], said
        assert not other.exists()

    step_2 = folder / "checkpoints" / "step-00000002"
    assert main([*whole, f"checkpoint.load={step_2}"]) == 0
    assert (steps(folder), steps(folder, "val_loss")) == ([1, 2, 3, 4], [0, 2, 4])
    again = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row).get("loss") for row in again] == [json.loads(row).get("loss") for row in losses]
    assert step_2.exists()
    rows = (folder / "metrics.jsonl").read_bytes()
    assert main(whole) == 0  # finished
    assert (folder / "metrics.jsonl").read_bytes() == rows

    def generate(*overrides: str) -> subprocess.CompletedProcess[str]:
        stub = [sys.executable, str(Path(__file__).parent / "stub_main.py"), "write"]
        line = [*stub, "generate", f"run.dir={folder}", *overrides, "prompt={a}, b"]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    log = folder / "logs" / "generate-rank-0.log"
    for override, refusal in {
        f"checkpoint.load={tmp_path}": f"{tmp_path}: holds no checkpoint",
        "parallel=tp8": "model.heads=4: not divisible by parallel.tp=8",
        "sample.seed=1": f"{folder / 'tokenizer.model'}: missing; put the tokenizer of the run's token files there",
    }.items():
        answer = generate(override)
        assert answer.returncode == 2 and answer.stderr.startswith(refusal)
        assert not log.exists()  # refused before a rank was started
    word_like(folder)
    done = generate()
    assert (done.returncode, done.stdout) == (0, "{a}, b\n"), done.stderr
    assert log.exists()


@pytest.mark.parametrize(
    ("load", "step", "same"), [(None, 2, True), ("run", 2, True), ("/elsewhere", 2, False), ("/elsewhere", None, False)]
)
def test_what_another_checkpoint_makes_is_another_run(
    load: str | None, step: int | None, same: bool, tokens: str, tmp_path: Path
) -> None:
    """A run that began elsewhere is known by its own checkpoint also without that; from a third place it is another."""
    config = tiny_config(tokens, **{"run.dir": str(tmp_path / "run"), "checkpoint.load": "/first"})
    path = load if load is None or load[0] == "/" else str(tmp_path / load)
    now = changed(config, {"checkpoint.load": path})
    manifest = None if step is None else Manifest(step, step, 8, 0, "single", {}, {}, {}, {}, {})
    if same:
        resume.refuse_other_run(tmp_path / "run", now, config, manifest)
    else:
        with pytest.raises(ConfigError, match=r"checkpoint.load /first -> /elsewhere"):
            resume.refuse_other_run(tmp_path / "run", now, config, manifest)


@pytest.mark.parametrize("traced,stays", [([1, 2], True), ([2, 3], False)])
def test_the_trace_of_steps_not_taken_again_stays(traced: list[int], stays: bool, tmp_path: Path) -> None:
    for name in rundir.TRACED:
        (tmp_path / name).touch()
    rundir.clear(tmp_path, 2, traced)
    assert [(tmp_path / name).exists() for name in rundir.TRACED] == [stays, stays]


def test_who_looks_does_not_hold(tmp_path: Path) -> None:
    assert not rundir.is_held(tmp_path)
    with rundir.claimed(tmp_path):
        assert rundir.is_held(tmp_path)
    assert not rundir.is_held(tmp_path)


def test_out_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_bad_out(str(tmp_path / "x.json"), None)
    refuse_bad_out(str(tmp_path / "run" / "x.json"), str(tmp_path / "run"))  # yet to be made
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"x.json: can't be written; name another file"):
        refuse_bad_out(str(tmp_path / "x.json"), None)


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"config.yaml: can't be written \(No space left on device\); make room"):
        write_atomic(tmp_path / "config.yaml", "x")
    assert list(tmp_path.iterdir()) == []
