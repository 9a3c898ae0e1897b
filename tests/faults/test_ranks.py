"""A rank that dies or hangs, anywhere in a step: it is named with what it did, and the run goes on to the same bits."""

from pathlib import Path

import pytest

from tests.faults.runs import Runs, causes, fault, hydra

PHASES = ("fwd", "bwd", "p2p", "collective", "opt")
# What the line about a rank says that is killed at the begin of such an operation, by a part of it.
NAMED = {"fwd": "F", "bwd": "B", "p2p": ("SEND", "RECV"), "collective": " over ", "opt": "optimizer"}


@pytest.fixture(scope="module")
def tp2pp2(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("tp2pp2"), tokens, ["parallel=tp2pp2", "train.steps=21"])


@pytest.fixture(scope="module")
def pp2dp2(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    overrides = ["parallel=pp2dp2", "parallel.zero=1", "train.steps=7", "train.micro_batch_size=1"]
    return Runs(tmp_path_factory.mktemp("pp2dp2"), tokens, overrides)


def killed_in(line: str, rank: int, step: int, phase: str) -> bool:
    named = NAMED[phase]
    return line.startswith(f"rank {rank} failed: ended by SIGKILL") and any(
        f" in step {step}, " in line and text in line.partition(f" in step {step}, ")[2].partition(";")[0]
        for text in (named if isinstance(named, tuple) else (named,))
    )


@pytest.mark.more
def test_every_rank_is_killed_in_every_phase(tp2pp2: Runs) -> None:
    """Twenty kills in one run, one in each step."""
    cases = [(rank, step, phase) for step, (rank, phase) in enumerate(((r, p) for p in PHASES for r in range(4)), 1)]
    said = tp2pp2.with_faults("killed", [fault(rank, step, phase, "sigkill") for rank, step, phase in cases])
    found = causes(said)
    assert len(found) == len(cases) == 20
    assert all(killed_in(line, *case) for line, case in zip(found, cases, strict=True)), found


@pytest.mark.more
def test_replicas_with_sharded_optimizer_state_are_killed(pp2dp2: Runs) -> None:
    cases = [(0, 1, "bwd"), (3, 2, "collective"), (1, 3, "opt"), (2, 4, "p2p"), (0, 5, "fwd"), (3, 6, "opt")]
    said = pp2dp2.with_faults("killed", [fault(rank, step, phase, "sigkill") for rank, step, phase in cases])
    found = causes(said)
    assert len(found) == len(cases) and all(killed_in(line, *case) for line, case in zip(found, cases, strict=True)), (
        found
    )


@pytest.mark.more
def test_a_rank_that_hangs_is_named_and_not_who_waits(tp2pp2: Runs) -> None:
    plan = [
        fault(2, 2, "bwd", "sigstop"),
        fault(1, 3, "collective", "gil"),
        fault(3, 4, "opt", "hang"),
        fault(0, 5, "p2p", "sigstop"),
        fault(0, 6, "data", "hang"),
    ]
    said = tp2pp2.with_faults("hangs", plan, "run.watchdog_s=6")
    reasons = ["stopped by a signal", "no heartbeat", "the others wait for it", "stopped by a signal"]
    for line, one, reason in zip(causes(said), plan, [*reasons, "the others wait for it"], strict=True):
        culprit, _, waiting = line.partition(f"({reason})")
        assert culprit.startswith(f"stuck: rank {one['rank']} for ") and f" in step {one['step']}, " in culprit, line
        assert "; rank" not in culprit and all(str(rank) in waiting for rank in range(4) if rank != one["rank"]), line
    stacks = (tp2pp2.folder / "hangs/logs/stacks-3.txt").read_text()
    assert "step 4, optimizer" in stacks and "hooks/fault.py" in stacks  # where the hanging rank stands


@pytest.mark.more
def test_ranks_out_of_step_are_named_on_both_sides(pp2dp2: Runs) -> None:
    """One rank alone begins a collective: the library crashes, or all wait for each other."""
    plan = [fault(1, 2, "opt", "desync"), fault(2, 3, "fwd", "desync")]
    first, second = causes(pp2dp2.with_faults("desync", plan, "run.watchdog_s=6"))
    assert "ranks are out of step in operation " in first and " over world of ranks 0, 1, 2, 3: " in first, first
    assert "has all_reduce [3] float32" in first and "has all_reduce [1] float64" in first and "rank 1 " in first, first
    assert "rank 2 " in second and "all_reduce over world" in second and "in 1F0" in second, second


@pytest.mark.more
def test_a_rank_that_fails_in_another_way(pp2dp2: Runs) -> None:
    plan = [
        fault(1, 2, "fwd", "exception"),
        fault(2, 3, "bwd", "segv"),
        fault(3, 4, "data", "exit"),
        fault(0, 5, "reduce", "exception"),
    ]
    said = pp2dp2.with_faults("fails", plan)
    starts = [
        "rank 1 failed: RuntimeError: a fault of fault.plan, in ",
        "rank 2 failed: ended by SIGSEGV in step 3, ",
        "rank 3 failed: exit code 7 in step 4, samples of the step",
        "rank 0 failed: RuntimeError: a fault of fault.plan, in ",
    ]
    assert all(line.startswith(start) for line, start in zip(causes(said), starts, strict=True)), causes(said)
    shown = "\n".join(said)
    assert "Connection closed" not in shown, "a victim was named"


def test_restarts_come_to_an_end(tokens: str, tmp_path: Path) -> None:
    """One more fault than restarts: exit code 1, the last failure's line, and the same command goes on from there."""
    runs = Runs(tmp_path, tokens, ["parallel=tp2", "train.steps=4"])
    plan = [fault(1, 2, "fwd", "sigkill"), fault(0, 3, "bwd", "sigkill")]
    code, said = runs.start("run", f"fault.plan={hydra(plan)}", "run.max_restarts=1")
    assert code == 1 and said[-1].startswith("rank 0 failed: ended by SIGKILL")
    events = (tmp_path / "run/restarts.jsonl").read_text().splitlines()
    assert len(events) == 1 and "rank 1 failed: ended by SIGKILL" in events[0]
    assert runs.start("run")[0] == 0
    runs.compare(tmp_path / "run")
