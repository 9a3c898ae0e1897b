"""Ranks that torchrun has started: a signal stops all of them after the same step, none outlives torchrun, and a guard
on each host names who died or is stuck."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, PrefixStore

from megapar.cli import main
from megapar.launch import guard
from megapar.launch.copies import PREFIX, SHARED
from megapar.launch.external import Place, answer, ask, earlier_folder, keep_folder
from megapar.launch.rank import Job
from megapar.launch.watch import BOARD, Watch, read_board
from megapar.trace.board import Doing, Memory
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_external import free_port
from tests.cli.test_cli_launch import HANG_S, alive, children_of, wait_for
from tests.faults.runs import Runs, fault, hydra


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("torchrun"), tokens, ["parallel=dp2", "train.steps=8"])


# Without it the agents of torch 2.13 that stay never tell one that comes later where their store is.
NEW_STORES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
FOUR = ["parallel=tp2dp2", "parallel.zero=1", "train.micro_batch_size=1"]


@pytest.fixture(scope="module")
def four_ranks(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("four"), tokens, ["train.steps=8", *FOUR])


HELD = fault(0, 3, "opt", "delay", seconds=4.0)


def static(host: int, port: int) -> list[str]:
    """One of two hosts."""
    return ["--nnodes=2", f"--node-rank={host}", "--master-addr=127.0.0.1", f"--master-port={port}"]


def dynamic(serves: bool, port: int) -> list[str]:
    """One of two hosts, of which another may take the place, unless it `serves` what they meet over."""
    options = f"is_host={int(serves)},keep_alive_interval=1,keep_alive_max_attempt=2"
    where = [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={options}"]
    return ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=x", *where]


class Torchrun:
    """torchrun with two ranks in `folder`, and what is to happen to them. meet: how it finds that of another host;
    options: more of torchrun's"""

    def __init__(
        self,
        runs: Runs,
        folder: Path,
        *overrides: str,
        plan: Any = HELD,
        meet: Sequence[str] = ("--standalone",),
        options: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        words = [*runs.words, "checkpoint.every=0", f"run.dir={folder}", f"fault.plan={hydra([plan])}", *overrides]
        command = [sys.executable, "-m", "torch.distributed.run", *meet, *options, "--nproc-per-node=2"]
        self.process = subprocess.Popen(
            [*command, "-m", "megapar.cli", *words],
            env=clean_environment() | {"OMP_NUM_THREADS": "1"} | (NEW_STORES if "--rdzv-backend=c10d" in meet else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def ranks_held(self) -> list[int]:
        assert wait_for(lambda: any((self.folder / ".faults").glob("*")), HANG_S)
        return children_of(self.process.pid)


@pytest.fixture
def start(runs: Runs, tmp_path: Path) -> Iterator[Callable[..., Torchrun]]:
    started: list[Torchrun] = []

    def start(*overrides: str, **of: Any) -> Torchrun:
        started.append(Torchrun(runs, tmp_path / "run", *overrides, **of))
        return started[-1]

    yield start
    for one in started:
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.communicate()


@pytest.mark.more
def test_a_signal_to_one_rank_stops_all_behind_the_step(start: Callable[..., Torchrun], runs: Runs) -> None:
    torchrun = start()
    ranks = torchrun.ranks_held()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGUSR1)
    said, _ = torchrun.process.communicate(timeout=HANG_S)
    assert "exitcode  : 85" in said, said  # torchrun's table of what it takes for failures
    assert [path.name for path in (torchrun.folder / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert main([*runs.words, f"run.dir={torchrun.folder}"]) == 0
    runs.compare(torchrun.folder)


@pytest.mark.more
def test_no_rank_outlives_torchrun(start: Callable[..., Torchrun]) -> None:
    torchrun = start("train.steps=1000000")
    ranks = torchrun.ranks_held()
    torchrun.process.kill()
    torchrun.process.wait()
    assert wait_for(lambda: not any(map(alive, ranks)), HANG_S)


@pytest.mark.more
def test_a_killed_rank_is_named(start: Callable[..., Torchrun]) -> None:
    torchrun = start(plan=fault(1, 3, "bwd", "sigkill"))
    said, _ = torchrun.process.communicate(timeout=HANG_S)
    assert re.search(r"^rank 1 failed: ended by SIGKILL.* in step 3, 0B\d+ in pipeline; logs: ", said, re.MULTILINE), (
        said
    )
    assert "rank 0 lost its peer" in said
    assert not (torchrun.folder / BOARD).exists()
    assert wait_for(lambda: not guards(), HANG_S)


@pytest.mark.more
def test_it_starts_again_from_a_copy_in_memory(start: Callable[..., Torchrun], runs: Runs) -> None:
    """Which outlives the ranks, and goes with torchrun."""
    torchrun = start("checkpoint.replicate=true", plan=fault(1, 6, "bwd", "sigkill"), options=["--max-restarts=1"])
    said, _ = torchrun.process.communicate(timeout=HANG_S)
    assert torchrun.process.returncode == 0, said
    assert re.search(r"^run: goes on from step 5 of 8, which /dev/shm/megapar-copies-", said, re.MULTILINE), said
    runs.compare(torchrun.folder)
    assert wait_for(lambda: not list(Path("/dev/shm").glob(f"megapar-copies-{torchrun.process.pid}-*")), HANG_S)


def test_ranks_that_are_started_again_have_the_same_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    agent, folders = HashStore(), []
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name, folder in (("first", "runs/a"), ("second", "runs/b")):
        store = PrefixStore(f"megapar/x/{name}", agent)
        folders.append(earlier_folder(store))
        keep_folder(store, folder)
    assert folders == [None, "runs/a"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "y")
    assert earlier_folder(PrefixStore("megapar/y/third", agent)) is None


@pytest.mark.more
def test_a_stop_is_no_failure_to_start_again_from(start: Callable[..., Torchrun], runs: Runs) -> None:
    torchrun = start(options=["--max-restarts=3"])
    ranks = torchrun.ranks_held()
    os.kill(ranks[0], signal.SIGUSR1)
    said, _ = torchrun.process.communicate(timeout=HANG_S)
    assert torchrun.process.returncode == 0 and said.count("run: ") == 1, said
    assert [path.name for path in (torchrun.folder / "checkpoints").glob("step-*")] == ["step-00000003"]


@pytest.mark.more
@pytest.mark.skipif(os.getuid() != 0, reason="only root makes a namespace of processes")
def test_torchrun_may_be_the_first_process_of_a_container(runs: Runs, tmp_path: Path) -> None:
    words = [*runs.words, f"run.dir={tmp_path}/run", "checkpoint.every=0"]
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "torch.distributed.run"]
    options = ["--standalone", "--nproc-per-node=2", "-m", "megapar.cli"]
    environment = clean_environment() | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options, *words], env=environment, capture_output=True, text=True, timeout=HANG_S)
    if "unshare failed" in done.stderr:
        pytest.skip("this machine does not allow it")
    assert done.returncode == 0, done.stderr
    runs.compare(tmp_path / "run")


@pytest.mark.more
def test_two_hosts(start: Callable[..., Torchrun], tmp_path: Path) -> None:
    """Rank 0's host shows what all do, and names who is stuck, wherever it is; the others' stacks are there."""
    port = free_port()
    overrides = ("parallel=tp2dp2", "run.watchdog_s=4")
    first, second = (start(*overrides, plan=fault(3, 3, "bwd", "sigstop"), meet=static(host, port)) for host in (0, 1))
    assert wait_for(lambda: [one.pid > 0 for one in read_board(first.folder)] == 4 * [True], HANG_S)
    assert main(["status", str(first.folder), f"out={tmp_path / 'status.json'}"]) == 0
    rows = json.loads((tmp_path / "status.json").read_text())["ranks"]
    assert {row["pid"] for row in rows if row["rank"] < 2} == set(children_of(first.process.pid))
    said, _ = first.process.communicate(timeout=HANG_S)
    line = next(line for line in said.splitlines() if line.startswith("stuck: "))
    assert re.search(r"stuck: rank 3 for [4-9]\.\d s in step 3, 0B\d+ in pipeline \(stopped by a signal\)", line), line
    assert "rank 2 waits in step 3, all_reduce over tp of ranks 2, 3" in line
    assert sorted(path.name for path in (first.folder / "logs").glob("stacks-*")) == [
        "stacks-0.txt",
        "stacks-1.txt",
        "stacks-2.txt",
    ]
    assert "ended by" not in second.process.communicate(timeout=HANG_S)[0]
    assert wait_for(lambda: not guards(), HANG_S)


@pytest.mark.more
def test_two_hosts_start_again_from_copies_in_memory(start: Callable[..., Torchrun], four_ranks: Runs) -> None:
    """Each has those of its own ranks and of the other's, and both go with their torchrun."""
    port, killed = free_port(), fault(3, 6, "save", "sigkill", point="to the next host")
    hosts = [
        start(
            *FOUR,
            "checkpoint.replicate=true",
            plan=killed,
            meet=static(host, port),
            options=["--max-restarts=1"],
        )
        for host in (0, 1)
    ]
    said = [one.process.communicate(timeout=HANG_S)[0] for one in hosts]
    assert [one.process.returncode for one in hosts] == [0, 0], said
    assert "run: goes on from step 5 of 8, which /dev/shm/megapar-copies-" in said[0], said[0]
    four_ranks.compare(hosts[0].folder)
    pids = [one.process.pid for one in hosts]
    assert wait_for(lambda: not any(list(SHARED.glob(f"{PREFIX}{pid}-*")) for pid in pids), HANG_S)


@pytest.mark.more
def test_another_host_takes_the_place_of_a_lost_one(start: Callable[..., Torchrun], four_ranks: Runs) -> None:
    """And its ranks go on with what the lost host had given to its neighbour: nothing is on disk."""
    port, waits = free_port(), fault(0, 6, "opt", "delay", seconds=600.0)
    words = [*FOUR, "checkpoint.replicate=true"]
    stays = start(*words, meet=dynamic(True, port), plan=waits, options=["--max-restarts=1"])
    lost = start(*words, meet=dynamic(False, port), plan=waits)
    stays.ranks_held()
    os.killpg(lost.process.pid, signal.SIGKILL)
    another = start(*words, meet=dynamic(False, port), plan=waits)
    said = [one.process.communicate(timeout=HANG_S)[0] for one in (stays, another)]
    assert [one.process.returncode for one in (stays, another)] == [0, 0], said
    assert "run: goes on from step 5 of 8, which /dev/shm/megapar-copies-" in said[0], said[0]
    four_ranks.compare(stays.folder)


@pytest.mark.more
def test_a_host_that_says_nothing_ends_the_run(start: Callable[..., Torchrun]) -> None:
    """Stopped as a whole, ranks and guard, it is as one that the network has lost: both sides end."""
    port = free_port()
    overrides = ("parallel=tp2dp2", "run.watchdog_s=4", "train.steps=1000000")
    first, second = (start(*overrides, plan=fault(0, 3, "opt", "delay"), meet=static(host, port)) for host in (0, 1))
    assert wait_for(lambda: min([one.step for one in read_board(first.folder)], default=0) > 3, HANG_S)
    [away] = [pid for pid, host in guards().items() if host != "127.0.0.1"]
    stopped = [*children_of(second.process.pid), away]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    said, _ = first.process.communicate(timeout=HANG_S)
    assert re.search(r"stuck: rank 2 for .*; rank 3 for .* \((no heartbeat|stopped by a signal)\)", said), said
    for pid in stopped:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    said, _ = second.process.communicate(timeout=HANG_S)
    assert wait_for(lambda: not guards(), HANG_S)


def test_a_start_has_one_name_though_a_rank_of_it_comes_anew() -> None:
    """What a rank that has gone asked is answered, and so is its successor, alike; the next start has another name."""
    store, first, other = (
        HashStore(),
        Place(0, 2, 0, 2, "", 0, True, "job", 0, 1),
        Place(1, 2, 1, 2, "", 0, True, "job", 0, 1),
    )
    names = []
    for gone in ("gone", "gone, too"):
        store.set("megapar/job/asks/1", gone)
        names.append(ask(store, first))
        answering = threading.Thread(target=answer, args=(store, first, names[-1]), daemon=True)
        answering.start()
        store.wait([f"megapar/job/answer/{gone}"], timedelta(seconds=HANG_S))
        found: list[str] = []
        asking = threading.Thread(target=lambda: found.append(ask(store, other)), daemon=True)  # noqa: B023
        asking.start()
        for thread in (asking, answering):
            thread.join(HANG_S)
        assert found == [names[-1]] and not answering.is_alive()
    assert names[0] != names[1]


def test_who_does_not_know_the_token_tells_a_guard_nothing(tmp_path: Path) -> None:
    """A guard whose one rank is this process: it shows what another host's guard tells, and ends with its rank."""
    mine = guard.address(guard.start(2, "127.0.0.1"))
    job = Job("", "", "", str(tmp_path), "cpu", 60.0, 2, watchdog_s=60.0)
    tied = guard.tie(mine, mine, 0, job)
    told = {"pages": {"1": page(pid=7, step=5)}}
    for token, there in (("x", 0), ("", 0), (mine.token, 7)):
        with socket.create_connection(("127.0.0.1", mine.port)) as link:
            for message in ({"token": token, "host": "b", "ranks": [1]}, told):
                link.sendall(json.dumps(message).encode() + b"\n")
            assert wait_for(lambda: len(read_board(tmp_path)) == 2, HANG_S)
            if there:
                assert wait_for(lambda: read_board(tmp_path)[1].pid == 7, HANG_S)
            else:
                assert link.recv(1 << 16).replace(b'{"alive": true}\n', b"") == b""  # it hangs up
                assert read_board(tmp_path)[1].pid == 0
    tied.end("done")
    tied.connection.close()
    assert wait_for(lambda: not guards(), HANG_S)
    assert not (tmp_path / BOARD).exists()


def test_ranks_of_a_host_that_cannot_be_reached_are_not_missed() -> None:
    """They are there, though not watched; our own launcher's ranks are all on its host."""
    job, nothing = (
        Job("", "", "", "", "cpu", 1.0, 2),
        [Doing(rank, 0, 0, "", "", False, 0.0, 0.0, 0) for rank in (0, 1)],
    )
    assert [one.since for one in Watch(job, None).absent(nothing, 5.0)] == [5.0, 5.0]
    memory = Memory.create(2)
    assert memory is not None
    assert guard._Watch(job, memory, None).absent(nothing, 5.0) == []  # type: ignore[arg-type]
    memory.close()


def page(**other: Any) -> dict[str, Any]:
    shown = Doing(1, 0, 0, "forward", "", False, 0.0, 0.0, 1).__dict__ | other
    del shown["rank"], shown["since"], shown["beat"]
    return shown | {"state": "R", "seconds": 1.0, "silent_s": 0.1}


def guards() -> dict[int, str]:
    """Processes of guards that live, and the hosts that they were told they are on."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_text().split("\0")
            if "megapar.launch.guard" in words:
                found[int(path.parent.name)] = words[-2]
    return found
