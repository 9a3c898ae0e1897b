"""A rank that dies, or a full disk, at any step of a checkpoint: what has a name is whole, and the run goes on."""

from pathlib import Path

import pytest

from megapar.checkpoint.format import STEP_FOLDER, read_manifest
from tests.faults.runs import Runs, causes, fault, hydra

OF_RANK_0 = ("sweep", "manifest", "rename", "latest", "removal")
OF_WRITERS = ("begin of a file", "tensor of a file", "end of a file")


@pytest.fixture(scope="module")
def runs(tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both ranks write a file."""
    overrides = ["parallel=pp2", "train.steps=10", "checkpoint.keep=2"]
    return Runs(tmp_path_factory.mktemp("pp2"), tokens, overrides)


def complete(folder: Path) -> list[str]:
    """The step folders, each of which is whole; nothing else is there but `latest`."""
    names = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name != "latest")
    for name in names:
        assert STEP_FOLDER.fullmatch(name), names
        manifest = read_manifest(folder / "checkpoints" / name)
        for file, facts in manifest.files.items():
            assert (folder / "checkpoints" / name / file).stat().st_size == facts.size
    return names


@pytest.mark.more
def test_a_rank_is_killed_at_every_step_of_a_save(runs: Runs) -> None:
    cases = [(0, point) for point in OF_RANK_0] + [(step % 2, point) for step, point in enumerate(OF_WRITERS)]
    plan = [fault(rank, step, "save", "sigkill", point=f"'{point}'") for step, (rank, point) in enumerate(cases, 2)]
    found = causes(runs.with_faults("killed", plan))
    for line, (step, (rank, point)) in zip(found, enumerate(cases, 2), strict=True):
        assert line.startswith(f"rank {rank} failed: ended by SIGKILL") and f" in step {step}, {point} in save" in line
    assert complete(runs.folder / "killed") == ["step-00000009", "step-00000010"]


@pytest.mark.more
def test_a_rank_is_killed_while_a_thread_of_it_writes(runs: Runs) -> None:
    """What is saved beside the next steps, some of which are done before the kill comes."""
    cases = zip((2, 5, 8), (0, 1, 0), OF_WRITERS, strict=True)
    plan = [fault(rank, step, "save", "sigkill", point=f"'{point}'") for step, rank, point in cases]
    never = fault(0, 4, "save", "sigkill", point="'no such point'")
    said = runs.with_faults("async", [*plan, never], "checkpoint.async_save=true")
    assert [line.partition(" failed: ended by SIGKILL")[0] for line in causes(said)] == ["rank 0", "rank 1", "rank 0"]
    assert complete(runs.folder / "async") == ["step-00000009", "step-00000010"]


@pytest.mark.more
@pytest.mark.parametrize(("rank", "point"), [(0, "sweep"), (1, "tensor of a file"), (0, "manifest"), (0, "latest")])
def test_a_full_disk_keeps_what_was_there(rank: int, point: str, runs: Runs) -> None:
    """One line that says what can't be written where; and with room, the same command goes on."""
    name = f"full {point}"
    plan = [fault(rank, 4, "save", "disk_full", point=f"'{point}'")]
    code, said = runs.start(name, f"fault.plan={hydra(plan)}", "run.max_restarts=3")
    assert code == 2 and "No space left on device" in said[-1] and "checkpoints/" in said[-1], said
    assert "step-00000003" in complete(runs.folder / name)
    assert runs.start(name)[0] == 0
    runs.compare(runs.folder / name)


@pytest.mark.more
@pytest.mark.parametrize("waits", [True, False])
def test_a_run_may_go_on_without_one_that_cannot_be_written(waits: bool, runs: Runs) -> None:
    """It says which is missing, and writes the next one; but not without its last, which says what is to be done."""
    name = f"without {waits}"
    keys = ["checkpoint.on_error=warn", f"checkpoint.async_save={str(not waits).lower()}", "checkpoint.keep=0"]
    plan = [
        fault(1, 4, "save", "disk_full", point="'tensor of a file'"),
        fault(0, 8, "save", "disk_full", point="latest"),
    ]
    plan = plan if waits else plan[1:]
    code, said = runs.start(name, f"fault.plan={hydra(plan)}", *keys)
    assert code == 0, said
    missing = [4] if waits else []
    found = [int(step.removeprefix("step-")) for step in complete(runs.folder / name)]
    assert set(range(1, 11)) - set(found) == set(missing)
    runs.compare(runs.folder / name)
    plan = [fault(0, 10, "save", "disk_full", point="manifest")]
    code, said = runs.start(f"{name} last", f"fault.plan={hydra(plan)}", *keys, "checkpoint.async_save=false")
    assert code == 2 and "No space left on device" in said[-1], said
