"""What the launcher makes of signals, of changed slots, and of both."""

import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from megapar.launch.failure import Stopped
from megapar.launch.signals import LOOK_S, Signals, stopped_between
from megapar.stop import STOPPING, StopRequest
from tests.cli.test_cli_launch import HANG_S, wait_for


@pytest.fixture
def request_of_ranks(tmp_path: Path) -> StopRequest:
    """Ranks listen."""
    made = StopRequest(tmp_path)
    made.listen(True)
    return made


@pytest.fixture(autouse=True)
def twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal may come at once."""
    monkeypatch.setattr("megapar.launch.signals.AGAIN_S", 0.0)


def test_the_same_signal_at_once_is_no_second_one(
    request_of_ranks: StopRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `timeout` sends it, to its child and to the group that this is in. Another one is."""
    monkeypatch.setattr("megapar.launch.signals.AGAIN_S", HANG_S)
    signals = Signals(request_of_ranks, "stopping\n", 1000.0)
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert request_of_ranks.asked() and signals.ended_by is None
        with pytest.raises(SignalException):
            os.kill(os.getpid(), signal.SIGUSR1)
    signals = Signals(request_of_ranks, "", None)  # of a command that saves nothing every Ctrl-C counts, as in a chat
    with signals.handled():
        assert request_of_ranks.heard()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            assert request_of_ranks.heard() and signals.ended_by is None


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


def test_a_run_whose_last_step_is_done_ends_by_itself(
    request_of_ranks: StopRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the first signal; the next one ends it."""
    signals = Signals(request_of_ranks, "stopping\n", 1000.0, lambda: "fewer may run")
    request_of_ranks.finish()
    with signals.handled():
        assert not wait_for(lambda: signals.going_on, 3 * LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.ended_by is None and not signals.early and request_of_ranks.asked()
        assert capfd.readouterr().err == "SIGTERM: the last step is done; the run ends by itself\n"
        with pytest.raises(SignalException):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signals.ended_by == signal.SIGTERM and not signals.early


@pytest.mark.parametrize("grace_s", [1000.0, None])
def test_nothing_is_to_be_saved_before_ranks_listen(grace_s: float | None, tmp_path: Path) -> None:
    """Of commands that save nothing at all Ctrl-C is what it always is."""
    signals = Signals(StopRequest(tmp_path), "", grace_s)
    with signals.handled(), pytest.raises(SignalException):
        os.kill(os.getpid(), signal.SIGINT)
    assert signals.ended_by == signal.SIGINT and signals.early == (grace_s is not None)


def test_between_two_starts_a_run_stops_at_once() -> None:
    """As while its newest checkpoint is hashed; what was handled before is handled again behind it."""
    before = [signal.getsignal(one) for one in STOPPING]
    for number in STOPPING:
        with pytest.raises(Stopped), stopped_between():
            os.kill(os.getpid(), number)
    assert [signal.getsignal(one) for one in STOPPING] == before


def test_looks_leave_nothing_behind(tmp_path: Path) -> None:
    looks: list[None] = []
    signals = Signals(StopRequest(tmp_path), "", 1000.0, lambda: looks.append(None))
    with signals.handled():
        assert wait_for(lambda: len(looks) > 8, HANG_S)
        assert len(signals._timers) <= 2
