"""What a rank writes of what it does, and others read; and what ranks compare of their collectives."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megapar.trace.announcements import Announcements, Desynchronised, described, out_of_step
from megapar.trace.board import BEAT_S, Board, Memory, open_memory
from tests.cli.test_cli_launch import wait_for


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory.create(3)
    assert made is not None
    yield made
    made.close()


def test_operations_nest_and_one_that_fails_is_named_until_what_is_around_it_ends(memory: Memory) -> None:
    board = Board(memory, 1)
    assert memory.read(1).operation == "not started"
    board.at_step(7)
    with board.doing("outer"):
        depth = board.enter("all_reduce over tp of ranks 0, 1", waiting=True)
        now = memory.read(1)
        assert (now.operation, now.within, now.waiting, now.step) == (
            "all_reduce over tp of ranks 0, 1",
            "outer",
            True,
            7,
        )
        assert now.text == "step 7, all_reduce over tp of ranks 0, 1 in outer"
        board.leave(depth)
        with pytest.raises(ValueError), board.doing("fails"):
            raise ValueError
        assert memory.read(1).operation == "fails"
    last = memory.read(1)
    assert (last.operation, last.within, last.waiting) == ("between operations", "", False)
    assert last.count == 6 and 0 <= time.monotonic() - last.since < 60
    assert memory.read(0).operation == memory.read(2).operation == "not started"


def test_texts_are_cut_and_may_hold_anything(memory: Memory) -> None:
    Board(memory, 0).enter("\u00e9" * 200)
    assert memory.read(0).operation == "\u00e9" * 96  # 192 bytes
    assert memory.read(1).pid == 0


def test_a_path_that_is_no_board_is_not_opened(memory: Memory, tmp_path: Path) -> None:
    """It comes from a file in a run directory, which may be a stranger's."""
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "megapar-board").symlink_to(tmp_path / "secret")
    for path in (tmp_path / "megapar-board", tmp_path / "secret", f"/proc/{os.getpid()}/fd/0"):
        with pytest.raises(OSError):
            open_memory(str(path))
    looking = open_memory(memory.path, write=False)
    with pytest.raises(TypeError):
        looking.clear(0)
    looking.close()


def test_one_that_has_ended_stays_so(memory: Memory, tmp_path: Path) -> None:
    board = Board(memory, 1)
    board.live(str(tmp_path / "stacks.txt"))
    assert memory.read(1).pid == os.getpid()
    board.end()
    time.sleep(3 * BEAT_S)
    assert memory.read(1).pid == 0


def test_long_texts_that_differ_at_their_end_are_told_apart(memory: Memory) -> None:
    mine, theirs = Announcements(memory, 0), Announcements(memory, 1)
    long = "gradient reduction of bucket 0 with a name that is longer than a record"
    theirs.announce("dp", f"{long} float32")
    number = mine.announce("dp", f"{long} bfloat16")
    with pytest.raises(Desynchronised):
        mine.compare("dp", number, f"{long} bfloat16", [0, 1])


def test_what_is_half_written_is_never_read(memory: Memory) -> None:
    """A rank that was ended in the middle of it: its last heartbeat counts."""
    board = Board(memory, 0)
    board.enter("something")
    board._beat()
    memory.map[0] = 1
    memory.map[24:60] = bytes(36)
    assert memory.read(0).since == memory.read(0).beat > 0


def test_memory_is_opened_by_its_path_and_not_what_has_its_number_now(memory: Memory, tmp_path: Path) -> None:
    Board(memory, 2).enter("seen from elsewhere")
    other = open_memory(memory.path)
    assert (other.ranks, other.read(2).operation) == (3, "seen from elsewhere")
    other.close()
    with open(tmp_path / "a file", "w") as file, pytest.raises(OSError):
        open_memory(f"/proc/{os.getpid()}/fd/{file.fileno()}")
    with pytest.raises(OSError):
        open_memory("/proc/999999999/fd/3")


def test_stacks_are_written_when_they_are_asked_for(tmp_path: Path) -> None:
    memory = Memory.create(1)  # not closed: the thread goes on with it
    assert memory is not None
    board, file = Board(memory, 0), tmp_path / "stacks.txt"
    board.enter("an operation")
    board.live(str(file))
    assert memory.read(0).pid == os.getpid() and not file.exists()
    memory.ask_for_stacks(0)
    assert wait_for(lambda: not memory.has_asked(0), 30)
    assert "an operation" in file.read_text() and "test_stacks_are_written" in file.read_text()


def test_a_board_without_memory_costs_nothing_else() -> None:
    board = Board()
    with board.doing("anything"):
        pass
    board.live("nowhere")
    assert Announcements.on(board) is None


def test_equal_announcements_are_silent_and_others_name_both_sides(memory: Memory) -> None:
    ranks = [Announcements(memory, rank) for rank in range(3)]
    over, x = "tp of ranks 0, 1", torch.zeros(2, 3)
    for rank in ranks[:2]:
        assert rank.announce(over, described("all_reduce", x)) == 1
    ranks[0].compare(over, 1, described("all_reduce", x), [0, 1])
    assert out_of_step(memory, range(3)) is None
    ranks[0].announce(over, described("all_reduce", x))
    ranks[1].announce(over, described("all_gather", x.double()))
    line = (
        "ranks are out of step in operation 2 over tp of ranks 0, 1: rank 0 has all_reduce [2, 3] float32, rank 1 has "
    )
    line += "all_gather [2, 3] float64"
    with pytest.raises(Desynchronised) as raised:
        ranks[0].compare(over, 2, described("all_reduce", x), [0, 1])
    assert str(raised.value) == line == out_of_step(memory, range(3))
    with pytest.raises(Desynchronised, match=r"rank 1 has all_gather .*, rank 0 has all_reduce"):
        ranks[1].compare(over, 2, described("all_gather", x.double()), [0, 1])


def test_a_peer_that_has_not_come_or_has_gone_on_is_not_compared(memory: Memory) -> None:
    first, second = Announcements(memory, 0), Announcements(memory, 1)
    first.announce("world", "a")
    first.compare("world", 1, "a", [0, 1])  # the other has announced nothing yet
    second.announce("world", "b")
    for _ in range(100):
        second.announce("tp", "c")
    first.compare("world", 1, "a", [0, 1])  # its record is gone


def test_a_receiver_compares_with_what_its_sender_sends(memory: Memory) -> None:
    sender, receiver = Announcements(memory, 0), Announcements(memory, 1)
    numbers = [receiver.expect("F from rank 0 to rank 1") for _ in range(2)]
    sender.announce("F from rank 0 to rank 1", "hidden [4, 8] float32")
    sender.announce("F from rank 0 to rank 1", "hidden [2, 8] float32")
    receiver.compare("F from rank 0 to rank 1", numbers[0], "hidden [4, 8] float32", [0])
    with pytest.raises(
        Desynchronised, match=r"operation 2 over F from rank 0 to rank 1: .* rank 0 has hidden \[2, 8\]"
    ):
        receiver.compare("F from rank 0 to rank 1", numbers[1], "hidden [4, 8] float32", [0])
