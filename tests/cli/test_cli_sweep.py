"""Sweeps: points, ledger, going on after failures and interruptions, joblib."""

import csv
import json
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megapar.cli import main
from megapar.cli.compose import split
from megapar.cli.ledger import Ledger
from megapar.cli.sweep import check_points, point_id, table
from megapar.launch.rundir import InUse, claimed
from tests.cli.test_cli_resume import STOPS, TINY, steps

SWEEP = ["-m", "run.dir=sweep", "train.steps=1", "optim.lr=1,2,3"]


def latest(folder: Path) -> dict[str, dict]:
    """The ledger's last row by value of the swept key."""
    rows = Ledger(folder).latest().values()
    return {next(o for o in row["overrides"] if o.startswith("optim.lr")): row for row in rows}


def starts(folder: Path, row: dict) -> int:
    return len((folder / row["point"] / "starts").read_text())


def test_one_failed_point_does_not_end_the_others_and_a_rerun_repeats_only_it(run: Callable, tmp_path: Path) -> None:
    first = run("lr_fails", "train", *SWEEP)
    assert first.code == 1
    rows = latest(tmp_path / "sweep")
    assert [rows[f"optim.lr={lr}"]["state"] for lr in (1, 2, 3)] == ["done", "failed", "done"]
    assert "ValueError: lr of 2" in rows["optim.lr=2"]["error"]
    assert "1.0000    0.2500" in first.out and "1,234" in first.out and "2 done, 1 failed" in first.out

    (tmp_path / "fixed").touch()
    reordered = ["-m", "optim.lr=3,2,1", "train.steps=1", "run.dir=sweep"]
    second = run("lr_fails", "train", *reordered)
    assert second.code == 0, second.err
    assert "3 done (2 of them before)" in second.out
    rows = latest(tmp_path / "sweep")
    assert [starts(tmp_path / "sweep", rows[f"optim.lr={lr}"]) for lr in (1, 2, 3)] == [1, 2, 1]


@pytest.mark.parametrize("name", ["r_${x}", r"a\${b}", "it's"])
def test_a_sweep_may_have_any_folder(run: Callable, tmp_path: Path, name: str) -> None:
    done = run("lr_fails", "train", "-m", "optim.lr=1", "train.steps=1", f"run.dir={name}")
    assert done.code == 0, done.err
    assert [row["state"] for row in latest(tmp_path / name).values()] == ["done"]


def test_a_ledger_is_not_believed_without_what_it_speaks_of(run: Callable, tmp_path: Path) -> None:
    assert run("lr_fails", "train", "-m", "optim.lr=1,3", "train.steps=1", "run.dir=sweep").code == 0
    row = latest(tmp_path / "sweep")["optim.lr=3"]
    (tmp_path / "sweep" / row["point"] / "summary.json").unlink()
    again = run("lr_fails", "train", "-m", "optim.lr=1,3", "train.steps=1", "run.dir=sweep")
    assert again.code == 0 and "2 done (1 of them before)" in again.out
    rows = latest(tmp_path / "sweep")
    assert [starts(tmp_path / "sweep", rows[f"optim.lr={lr}"]) for lr in (1, 3)] == [1, 2]


@pytest.mark.more
def test_an_interrupted_sweep_goes_on(run: Callable, start: Callable, tmp_path: Path) -> None:
    sweep = start("sleeps", "-m", "run.dir=sweep", "optim.lr=1,2")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "sweep").glob("*/pid-0")) and time.monotonic() < deadline:
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    _, err = sweep.communicate(timeout=30)
    assert sweep.returncode == 85
    assert "Traceback" not in err
    assert [row["state"] for row in latest(tmp_path / "sweep").values()] == ["interrupted"]
    assert run("ok", "train", "-m", "run.dir=sweep", "optim.lr=1,2").code == 0
    assert [row["state"] for row in latest(tmp_path / "sweep").values()] == ["done", "done"]


def test_what_the_ledger_calls_done_is_looked_at(run: Callable, tmp_path: Path) -> None:
    """A point was skipped by the ledger's word, also after what it was made from had changed."""
    path = tmp_path / "experiments" / "mine" / "experiment.yaml"
    path.parent.mkdir(parents=True)
    words = ["-m", "run.dir=sweep", "experiment=mine", "optim.lr=1,3"]
    path.write_text("# @package _global_\ntrain:\n  steps: 1\n")
    assert run("lr_fails", "train", *words).code == 0
    with open(tmp_path / "sweep" / "ledger.jsonl", "a") as file:
        file.write('[1]\n{"point": 5}\n')  # JSON, and none of ours
    again = run("lr_fails", "train", *words)
    assert again.code == 0 and "2 done (2 of them before)" in again.out
    path.write_text("# @package _global_\ntrain:\n  steps: 1\n  seed: 7\n")
    other = run("lr_fails", "train", *words)
    assert other.code == 1 and "2 failed" in other.out and "train.seed 1234 -> 7" in other.out


@pytest.mark.more
def test_a_killed_sweep_goes_on(run: Callable, tmp_path: Path) -> None:
    """`running` without anybody who holds the point's lock is left over from a killed sweep."""
    assert run("lr_fails", "train", "-m", "run.dir=sweep", "optim.lr=1,3").code == 0
    ledger = Ledger(tmp_path / "sweep")
    row = latest(tmp_path / "sweep")["optim.lr=3"]
    (tmp_path / "sweep" / row["point"] / "summary.json").unlink()
    ledger.append(row["point"], "running", overrides=row["overrides"], call="before")
    with open(ledger.path, "a") as file:
        file.write('{"point": "torn')  # killed while it wrote
    assert run("lr_fails", "train", "-m", "run.dir=sweep", "optim.lr=1,3").code == 0
    rows = latest(tmp_path / "sweep")
    assert [rows[f"optim.lr={lr}"]["state"] for lr in (1, 3)] == ["done", "done"]
    assert [starts(tmp_path / "sweep", rows[f"optim.lr={lr}"]) for lr in (1, 3)] == [1, 2]


@pytest.mark.more
def test_joblib_runs_points_side_by_side(run_process: Callable, tmp_path: Path) -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = run_process("ok", "-m", "run.dir=sweep", "parallel=tp2,pp2", *joblib)
    assert done.code == 0, done.err
    assert "shown" not in done.out  # progress of two runs at once would be a mess
    seen = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/seen-1.json")]
    assert [rank["sum"] for rank in seen] == [1.0, 1.0]
    assert not any(rank["hydra"] for rank in seen)


def test_default_folder_and_single_run_folder(run: Callable, tmp_path: Path) -> None:
    assert run("lr_fails", "train", "-m", "run.name=tune", "optim.lr=1,3").code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-tune-sweep")
    point = next(folder.glob("*/config.yaml")).parent
    refused = run("lr_fails", "train", "-m", f"run.dir={point}", "optim.lr=1,3")
    assert refused.code == 2 and "is a single run" in refused.err


def test_a_sweep_finds_its_own_unfinished_folder(run: Callable, tmp_path: Path) -> None:
    """Without run.dir, by what is swept, in any order of values; a finished one is said, and another is made."""
    sweep = ["-m", "train.steps=1", "run.name=[x]"]
    assert run("lr_fails", "train", *sweep, "optim.lr=1,2").code == 1
    assert run("lr_fails", "train", *sweep, "optim.lr=1,3").code == 0  # another sweep
    (tmp_path / "fixed").touch()
    again = run("lr_fails", "train", *sweep, "optim.lr=2,1")
    assert again.code == 0 and "goes on: 1 of 2 points are done" in again.err
    assert len(list((tmp_path / "runs").iterdir())) == 2
    third = run("lr_fails", "train", *sweep, "optim.lr=1,2")
    assert third.code == 0 and "sweep: the same one is finished in runs/" in third.err
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 3 and all(folder.name.endswith("-[x]-sweep") for folder in folders)


def test_the_table_of_a_sweep(run: Callable, tmp_path: Path) -> None:
    """`megapar sweep`: as `train -m` prints it, and as CSV; a point killed while it ran is interrupted."""
    done = run("lr_fails", "train", *SWEEP)
    before = (tmp_path / "sweep" / "ledger.jsonl").read_bytes()
    shown = run("lr_fails", "sweep", "sweep", "out=sweep.csv")
    assert shown.code == 0 and shown.out in done.out
    assert (tmp_path / "sweep" / "ledger.jsonl").read_bytes() == before
    with open(tmp_path / "sweep.csv", newline="") as file:
        table = {row["optim.lr"]: row for row in csv.DictReader(file)}
    assert [table[lr]["state"] for lr in "123"] == ["done", "failed", "done"]
    assert (table["3"]["loss"], table["3"]["val_loss"], table["3"]["train.steps"]) == ("3.0", "0.75", "1")
    assert "lr of 2" in table["2"]["error"]
    row = latest(tmp_path / "sweep")["optim.lr=3"]
    Ledger(tmp_path / "sweep").append(row["point"], "running", overrides=row["overrides"], call="x")
    assert f"{row['point']}  interrupted " in run("lr_fails", "sweep", "sweep").out
    with claimed(tmp_path / "sweep" / row["point"]):
        assert f"{row['point']}  running " in run("lr_fails", "sweep", "sweep").out
    for words, line in {
        "": "run.dir=null: says which sweep; give the folder of one: megapar sweep DIR",
        "nowhere": "run.dir=nowhere: holds no sweep (no ledger.jsonl); name the folder of one",
    }.items():
        refused = run("lr_fails", "sweep", *words.split())
        assert (refused.code, refused.err.strip()) == (2, line)


@pytest.mark.more
def test_an_interrupted_point_goes_on_from_its_checkpoint(
    tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole sweep ends with the first point's Ctrl-C; its last line goes on, and so does the same command."""
    monkeypatch.chdir(tmp_path)
    line = ["train", "-m", *TINY, f"data.path={tokens}", "optim.lr=1e-2,2e-2"]
    for entry in (STOPS, STOPS):  # the second start ends the first point, and is stopped in the second
        assert main(line, entry=entry) == 85
        said = capsys.readouterr().err.strip().splitlines()
        assert said[-2] == "interrupted" and said[-1].startswith("megapar train -m ")
    assert any(text.startswith("run: goes on from step 3 of 6") for text in said)
    assert main(shlex.split(said[-1])[1:]) == 0
    assert "2 done (1 of them before)" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    for point in folder.glob("*/metrics.jsonl"):
        assert steps(point.parent) == [1, 2, 3, 4, 5, 6]
    assert (folder / "sweep.csv").exists()


def test_verbatim_keys_reach_every_point(run: Callable, tmp_path: Path) -> None:
    assert run("lr_fails", "train", "-m", "run.dir=a, {b}", "run.name=x=$[1]", "optim.lr=1,3").code == 0
    configs = list((tmp_path / "a, {b}").glob("*/config.yaml"))
    assert len(configs) == 2
    assert all("name: x=$[1]" in path.read_text() for path in configs)


def test_points_are_checked_before_the_first_starts() -> None:
    check_points(split(["parallel=tp2,pp2", "optim.lr=choice(1,2)", "train.steps=range(1,3)"]))
    with pytest.raises(Exception, match=r"parallel.pp=4.*in the point model.layers=3 parallel=pp4"):
        check_points(split(["model.layers=4,3", "parallel=pp4"]))


def test_point_id_depends_on_the_overrides_only() -> None:
    assert point_id(split(["a=1", "b=2"])) == point_id(split(["b=2", "a=1"]))
    assert point_id(split(["a=1"])) != point_id(split(["a=2"]))
    assert point_id(split(["run.name=x"])) != point_id(split([]))


def test_a_point_runs_once_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path / "p"), pytest.raises(InUse), claimed(tmp_path / "p"):
        pass
    with claimed(tmp_path / "p"):
        pass


def test_a_point_that_runs_elsewhere_is_left_to_it(run: Callable, corpus: list[str], tmp_path: Path) -> None:
    sweep = ["-m", "run.dir=sweep", "optim.lr=1,3"]
    (tmp_path / "sweep").mkdir()
    with claimed(tmp_path / "sweep" / point_id(split(["optim.lr=1", *corpus]))):
        done = run("lr_fails", "train", *sweep)
    assert "running in another process" in done.err
    assert list(latest(tmp_path / "sweep")) == ["optim.lr=3"]


def test_a_torn_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.path.write_text('{"point": "torn')
    ledger.append("p", "running")
    assert list(ledger.latest()) == ["p"]


def test_table_leaves_out_what_all_points_share(tmp_path: Path) -> None:
    rows = {
        name: {"state": "done", "overrides": ["data.path=x", f"optim.lr={name}"], "seconds": 1.0} for name in ("1", "2")
    }
    shown = table(tmp_path, rows)
    assert "optim.lr=1" in shown and "data.path" not in shown
