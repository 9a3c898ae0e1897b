"""What the launcher makes of signals, of changed slots, and of both."""

import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from megapar.launch.signals import LOOK_S, Signals
from megapar.stop import StopRequest
from tests.cli.test_cli_launch import HANG_S, wait_for


@pytest.fixture
def request_of_ranks(tmp_path: Path) -> StopRequest:
    """Ranks listen."""
    made = StopRequest(tmp_path)
    made.listen(True)
    return made


def test_a_signal_behind_a_change_of_slots_is_the_first(request_of_ranks: StopRequest) -> None:
    """As where a node is taken away: its slots are fewer, then TERM comes. The run stops for good, with a state."""
    signals = Signals(request_of_ranks, "stopping\n", 1000.0, lambda: "fewer may run")
    with signals.handled():
        assert wait_for(request_of_ranks.asked, HANG_S) and signals.going_on
        os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.going_on and signals.ended_by is None
        with pytest.raises(SignalException):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signals.ended_by == signal.SIGTERM


def test_a_change_of_slots_has_all_the_time_it_needs(request_of_ranks: StopRequest) -> None:
    signals = Signals(request_of_ranks, "stopping\n", 0.0, lambda: "fewer may run")
    with signals.handled():
        assert wait_for(lambda: signals.going_on, HANG_S)
        assert not wait_for(lambda: signals.ended_by is not None, 3 * LOOK_S)


def test_looks_leave_nothing_behind(tmp_path: Path) -> None:
    looks: list[None] = []
    signals = Signals(StopRequest(tmp_path), "", 1000.0, lambda: looks.append(None))
    with signals.handled():
        assert wait_for(lambda: len(looks) > 8, HANG_S)
        assert len(signals._timers) <= 2
