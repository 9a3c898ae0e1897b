"""Ranks that something else has started: torchrun, and srun as far as its environment goes."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megapar.config import UserError
from megapar.launch.external import _difference, first_host, open_store, place
from megapar.launch.situation import situation
from tests.cli.conftest import HERE, clean_environment

SRUN = {
    "SLURM_JOB_ID": "70000",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n1,n2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_PROCID": "2",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, "local"),
        ({"MEGAPAR_WORKER": "1", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "worker"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, "torchrun"),
        ({"RANK": "0"}, "local"),
        (SRUN, "srun"),
        # a batch script: it has the whole job's numbers but is one process
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "local"),
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, "local"),
    ],
)
def test_situation(env: dict[str, str], expected: str) -> None:
    assert situation(env) == expected


def test_place_under_srun() -> None:
    here = place("srun", SRUN)
    assert (here.rank, here.world_size, here.local_rank, here.local_world_size) == (2, 4, 0, 2)
    assert (here.host, here.port) == ("n1", 20000 + (70000 * 31 + 2 * 7) % 12000)
    assert place("srun", SRUN | {"MEGAPAR_MASTER_ADDR": "127.0.0.1"}).host == "127.0.0.1"
    assert place("srun", SRUN | {"SLURM_STEP_ID": "3"}).port != here.port
    uneven = SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),1", "SLURM_NODEID": "2"}
    assert place("srun", uneven).local_world_size == 1


def test_place_needs_its_variables() -> None:
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        place("srun", {name: value for name, value in SRUN.items() if name != "SLURM_LOCALID"})


def test_node_list_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert first_host("node7") == "node7"
    with pytest.raises(UserError, match="MEGAPAR_MASTER_ADDR"):
        first_host("n[1-2]")


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun_env(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def srun_env(rank: int, ranks: int, port: int) -> dict[str, str]:
    env = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": str(ranks)}
    env |= {"SLURM_STEP_TASKS_PER_NODE": str(ranks), "SLURM_NODEID": "0"}
    return SRUN | env | {"MEGAPAR_MASTER_ADDR": "127.0.0.1", "MEGAPAR_MASTER_PORT": str(port)}


def finish(processes: list["subprocess.Popen[str]"]) -> tuple[list[int], list[str], list[str]]:
    outputs = [process.communicate(timeout=60) for process in processes]
    return [process.returncode for process in processes], [out for out, _ in outputs], [err for _, err in outputs]


def test_srun_ranks_run_one_config(start: Callable, tmp_path: Path) -> None:
    port = free_port()
    codes, out, err = finish(
        [start("ok", "parallel=dp2", "run.dir=run", env=srun_env(rank, 2, port)) for rank in (0, 1)]
    )
    assert codes == [0, 0], err
    assert out == ["shown 2\n", ""]
    ranks = [json.loads((tmp_path / f"run/seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["sum"] for rank in ranks] == [1.0, 1.0]
    assert [rank["hydra"] for rank in ranks] == [True, False]  # only rank 0 composes
    assert (tmp_path / "run/config.yaml").exists() and (tmp_path / "run/logs/rank-1.log").exists()


@pytest.mark.more
@pytest.mark.parametrize("environment", [torchrun_env, srun_env])
def test_all_ranks_leave_a_finished_run(environment: Callable, start: Callable, tmp_path: Path) -> None:
    for number in (1, 2):
        port = free_port()
        words = ["parallel=dp2", "train.steps=2", "run.dir=run"]
        codes, _, err = finish([start("rows", *words, env=environment(rank, 2, port)) for rank in (0, 1)])
        assert codes == [0, 0], err
        (tmp_path / "run" / "summary.json").touch()
        assert ("run: run is finished: 2 steps are done; " in err[0]) == (number == 2) and "finished" not in err[1]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2 * 2  # a stub's two rows on two ranks


@pytest.mark.parametrize("environment", [torchrun_env, srun_env])
def test_ranks_with_other_commands_are_refused_by_all(environment: Callable, start: Callable, tmp_path: Path) -> None:
    port, common = free_port(), ["parallel.dp=3", "train.global_batch_size=12", "run.dir=run"]
    own = {2: ["optim.lr=2"]}
    processes = [
        start("ok", *common, *own.get(rank, ["optim.lr=1"]), env=environment(rank, 3, port)) for rank in range(3)
    ]
    codes, _, err = finish(processes)
    assert codes == [2, 2, 2]
    assert (
        "".join(err) == "rank 2: its command line has optim.lr=2, where rank 0 has optim.lr=1; start all ranks alike\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("wrong", [0, 1])
def test_a_rank_whose_command_line_is_wrong_does_not_leave_alone(wrong: int, start: Callable) -> None:
    """It left before it met the others, which then waited for 300 s."""
    port, own = free_port(), {wrong: ["-m"]}
    codes, _, err = finish([start("ok", *own.get(rank, []), env=srun_env(rank, 2, port)) for rank in (0, 1)])
    assert codes == [2, 2]
    assert "rank 1: its command line has" in err[0] and "; start all ranks alike" in err[0] and err[1] == ""


def test_which_word_differs() -> None:
    assert _difference(["train", "a=1"], ["train"]) == "its command line lacks a=1, which rank 0 has"
    assert _difference(["train"], ["train", "a=1"]) == "its command line has a=1, where rank 0 has no more"


@pytest.mark.parametrize(
    ("answer", "said"), [(None, "no answer to what this name's address is"), (OSError("nothing"), "has no address")]
)
def test_a_name_that_is_not_resolved_is_said(
    answer: OSError | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(*_: object) -> None:
        if answer is not None:
            raise answer
        time.sleep(5)

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    monkeypatch.setattr("megapar.launch.external.RESOLVE_S", 0.1)
    with pytest.raises(UserError, match=f"node7: .*{said}.*give an address: MASTER_ADDR"):
        open_store(place("torchrun", torchrun_env(1, 2, 1) | {"MASTER_ADDR": "node7"}))


def refused(start: Callable) -> tuple[float, list[int], list[str]]:
    """Seconds from a refusal to the last exit, codes and what was said. Importing torch is not part of it."""
    port = free_port()
    arguments = ["ok", "parallel=tp2pp2dp2", "run.dir=run"]
    processes = [start(*arguments, env=torchrun_env(rank, 3, port)) for rank in range(3)]
    processes[0].wait(timeout=60)
    begin = time.monotonic()
    codes, _, err = finish(processes)
    return time.monotonic() - begin, codes, err


@pytest.mark.slow
def test_a_refusal_reaches_every_rank_at_once(start: Callable) -> None:
    assert refused(start)[0] < 5


def test_a_refusal_reaches_every_rank(start: Callable, tmp_path: Path) -> None:
    """Without it they would wait for train.timeout_s = 300 s, five times as long as `finish` does."""
    _, codes, err = refused(start)
    assert codes == [2, 2, 2]
    said = [line for text in err for line in text.splitlines()]
    assert len(said) == 1 and "2*2*2 = 8, but 3 ranks were started" in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"), [(["-m", "optim.lr=1,2"], "-m: "), (["--info", "config"], "--info"), (["--help"], "help")]
)
def test_what_many_ranks_can_not_do(arguments: list[str], words: str, start: Callable) -> None:
    port = free_port()
    codes, _, err = finish([start("ok", *arguments, env=torchrun_env(rank, 2, port)) for rank in (0, 1)])
    assert codes == [2, 2]
    assert words in err[0] and "torchrun" in err[0] and len(err[0].splitlines()) == 1
    assert err[1] == ""


@pytest.mark.more
def test_a_failing_rank_shows_its_traceback(start: Callable) -> None:
    port = free_port()
    processes = [start("raises", "parallel=dp2", "run.dir=run", env=torchrun_env(rank, 2, port)) for rank in (0, 1)]
    codes, out, err = finish(processes)
    assert codes == [1, 1]
    assert "ValueError: the culprit's own words" in out[1] + err[1]
    assert "Traceback" not in out[0] + err[0]  # the victim


@pytest.mark.more
@pytest.mark.parametrize("environment", [torchrun_env, srun_env])
def test_what_all_ranks_find_alike_is_said_once(environment: Callable, start: Callable) -> None:
    port = free_port()
    processes = [
        start("alike", "parallel.dp=3", "train.global_batch_size=12", env=environment(rank, 3, port))
        for rank in range(3)
    ]
    codes, out, err = finish(processes)
    assert codes == [2, 2, 2], err
    assert "".join(out) == "tokens.bin: truncated at byte 12; make it again with `megapar data`\n"


@pytest.mark.more
def test_what_one_rank_finds_is_said(start: Callable) -> None:
    port = free_port()
    processes = [start("mistake_of_1", "parallel=dp2", env=torchrun_env(rank, 2, port)) for rank in (0, 1)]
    codes, out, _ = finish(processes)
    assert codes == [1, 2]
    assert out[1] == "tokens.bin: no such file on this machine\n"
    assert out[0].startswith("rank 0 lost its peer")


def test_torchrun_itself(tmp_path: Path, corpus: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(HERE / "stub_main.py"), "ok"]
    command += ["train", "parallel=tp2", "run.dir=run", *corpus]
    done = subprocess.run(command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"run/seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["sum"] for rank in ranks] == [1.0, 1.0]
    assert [rank["hydra"] for rank in ranks] == [True, False]
