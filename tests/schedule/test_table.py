"""The CSV form: ours, and torch's compute-only form both ways."""

from pathlib import Path
from unittest import mock

import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from megapar.schedule.actions import Action, ScheduleError
from megapar.schedule.build import build, default_chunks
from megapar.schedule.check import check
from megapar.schedule.lower import lower
from megapar.schedule.simulate import simulate
from megapar.schedule.table import read, write
from tests.schedule.tables import NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_written_table_builds_the_same_schedule(name: str, tmp_path: Path) -> None:
    schedule = build(name, 3, 8)
    path = str(tmp_path / "table.csv")
    write(schedule, path)
    assert build(f"csv:{path}", 3, 8, chunks=default_chunks(name)) == schedule
    assert build(f"csv:{path}", 3, 8) == schedule


def test_cells_are_compute_actions(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write(build("zb_h1", 2, 2), str(path))
    assert path.read_text().splitlines() == ["0F0,0F1,0I0,0W0,0I1,0W1", "1F0,1I0,1F1,1I1,1W0,1W1"]
    path.write_text("0F0,, 0F1 ,0B0,0B1\n,1F0,1B0,,1F1,1B1\n\n")  # idle slots, spaces, a blank line
    assert build(f"csv:{path}", 2, 2) == lower(read(str(path)).rows, 2, 2)
    assert [str(action) for action in read(str(path)).rows[1]] == ["1F0", "1B0", "1F1", "1B1"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0F0,0X0\n", r"table\.csv, row 0, cell 1: '0X0' is no action; an action looks like 2F0"),
        ("0F0,0B0\n1F0,1SEND_B0\n", r"row 1, cell 1: 1SEND_B0 is no computation"),
        (",,\n", r"no actions; a row per rank"),
        ("0F0,(0F1;1B0)OVERLAP_FB\n", "is no action"),
    ],
)
def test_what_is_no_table_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ScheduleError, match=complaint):
        read(str(path))


def test_a_table_of_another_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write(build("1f1b", 2, 4), str(path))
    for ranks, microbatches, complaint in ((4, 4, "2 rows, and there are 4 ranks"), (2, 8, "4 micro-batches, and.* 8")):
        with pytest.raises(ScheduleError, match=complaint):
            build(f"csv:{path}", ranks, microbatches)
    with pytest.raises(ScheduleError, match="2 stages, and 2 ranks of 2 have 4"):
        build(f"csv:{path}", 2, 4, chunks=2)
    with pytest.raises(ScheduleError, match=r"nothing\.csv: not readable as a table: No such file"):
        build(f"csv:{tmp_path}/nothing.csv", 2, 4)


# ours, torch's class, stages per rank
TORCH = [
    ("gpipe", torch_schedules.ScheduleGPipe, 1),
    ("1f1b", torch_schedules.Schedule1F1B, 1),
    ("interleaved", torch_schedules.ScheduleInterleaved1F1B, 2),
    ("interleaved", torch_schedules.ScheduleInterleaved1F1B, 3),
    ("zbv", torch_schedules.ScheduleZBVZeroBubble, 2),
    ("dualpipe_v", torch_schedules.ScheduleDualPipeV, 2),
]


def torch_schedule(kind: type, ranks: int, microbatches: int, chunks: int) -> mock.Mock:
    """torch's schedule object on stages that are only numbers."""
    stages = [
        mock.MagicMock(group_size=ranks, group_rank=0, num_stages=ranks * chunks, stage_index=ranks * i)
        for i in range(chunks)
    ]
    with mock.patch.object(torch_schedules, "_check_torch_compile_compatibility"):
        return kind(stages[0] if chunks == 1 else stages, microbatches, loss_fn=lambda output, target: 0)


def dump(schedule: mock.Mock, ranks: int, path: Path) -> None:
    """Write torch's compute-only table as torch does."""
    if hasattr(schedule, "_dump_csv"):
        schedule._dump_csv(str(path), format="compute_only")
        return
    # GPipe and 1F1B have an order for display only. It has reductions in it, and 1F1B's names the micro-batches of the
    # last rank's forwards 1 to m, where its loop runs 0 to m - 1.
    lines = []
    for rank in range(ranks):
        row = [a for a in schedule._get_pipeline_order()[rank] if a is None or "REDUCE" not in str(a)]
        forwards = iter(range(len(row)))
        names = ["" if a is None else str(a) for a in row]
        lines.append(",".join(f"{rank}F{next(forwards)}" if "F" in name else name for name in names))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 8), (4, 16), (3, 9), (4, 10)])
@pytest.mark.parametrize(("name", "kind", "chunks"), TORCH)
def test_torchs_tables_load_and_ours_are_as_fast(
    name: str, kind: type, chunks: int, ranks: int, microbatches: int, tmp_path: Path
) -> None:
    path = tmp_path / "torch.csv"
    dump(torch_schedule(kind, ranks, microbatches, chunks), ranks, path)
    theirs = build(f"csv:{path}", ranks, microbatches)
    ours = build(name, ranks, microbatches, chunks=chunks)
    assert theirs.placement == ours.placement
    check(theirs)
    assert simulate(ours).step_time <= simulate(theirs).step_time + 1e-9  # rounding of a sum of thirds
    assert max(simulate(ours).peak) <= max(simulate(theirs).peak) + 1e-9


@pytest.mark.parametrize("name", ["interleaved", "zbv", "v_half", "dualpipe_v", "auto"])
def test_torch_loads_our_tables(name: str, tmp_path: Path) -> None:
    path = str(tmp_path / "ours.csv")
    schedule = build(name, 2, 8, chunks=2)
    write(schedule, path)
    loader = torch_schedule(torch_schedules.ScheduleZBVZeroBubble, 2, 8, 2)
    loader._load_csv(path, format="compute_only")
    order = loader.pipeline_order
    assert [[str(a) for a in order[rank]] for rank in range(2)] == [
        [str(a) for a in row if a.kind in ("F", "B", "I", "W")] for row in schedule.rows
    ]
    assert [loader.stage_index_to_group_rank[s] for s in range(4)] == list(schedule.placement)


def test_overlapped_cells_are_read_as_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("0F0,1F0,(0F1;1B0)OVERLAP_F_B,(1F1;0B0)OVERLAP_F_B,1B1,0B1\n")
    assert read(str(path)).rows == [
        [Action.parse(word) for word in ["0F0", "1F0", "0F1", "1B0", "1F1", "0B0", "1B1", "0B1"]],
    ]
