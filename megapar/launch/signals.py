"""Signals to the launcher. The first one asks ranks that listen to stop after their step and save; the next one, the
end of `grace_s`, or the first where none listens yet, ends them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from megapar.launch.failure import Stopped
from megapar.stop import STOPPING, StopRequest, in_time

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torch elastic ends the ranks at these
EARLY = "no step has begun, so there is no state to save\n"
FINISHING = "the last step is done; the run ends by itself\n"
AGAIN_S = 0.5  # the same signal sooner is no second one: `timeout` and others send it to us, and to all of our group
LOOK_S = 0.2  # between two looks whether the ranks listen by now, and whether the slots have changed


class Signals:
    """The launcher's handlers of STOPPING while ranks run.

    grace_s: seconds after a request to stop, after which the ranks are ended; None: Ctrl-C alone asks, and has no end
    said: printed at a request. changed: looked at every LOOK_S: what has changed so that the ranks are to stop and go
    on; None: nothing. ended_by: the signal that ended the ranks, if one did. going_on: `changed` asked them to stop.
    early: a request to stop came before ranks had anything to save, and ended them
    """

    def __init__(
        self, request: StopRequest, said: str, grace_s: float | None, changed: Callable[[], str | None] | None = None
    ) -> None:
        self.request, self.grace_s, self.said, self.changed = request, grace_s, said, changed
        self.ended_by: signal.Signals | None = None
        self.going_on = self.early = self._over = False
        self.taken: list[signal.Signals] = []
        self._timers: list[threading.Timer] = []
        self._last: tuple[signal.Signals, float] | None = None

    @contextmanager
    def handled(self, stop_in: float | None = None) -> Iterator[None]:
        """Inside, signals are taken where that is possible: not outside the main thread, nor one that this process was
        started with ignored. stop_in: seconds after which the ranks are asked to stop without a signal."""
        if stop_in is not None:
            self._after(stop_in, self._time_is_over)
        if self.changed is not None:
            self._after(LOOK_S, self._look)
        if threading.current_thread() is threading.main_thread():
            ours = STOPPING if self.grace_s is not None else (signal.SIGINT,)
            self.taken = [one for one in ours if signal.getsignal(one) != signal.SIG_IGN]
        before = {one: signal.signal(one, self._handle) for one in self.taken}
        try:
            yield
        finally:
            self._over = True
            for timer in self._timers:
                timer.cancel()
            for one, handler in before.items():
                signal.signal(one, handler)

    def _handle(self, number: int, frame: object) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        by, now = signal.Signals(number), time.monotonic()
        before, self._last = self._last, None if self.grace_s is None else (by, now)
        if before is not None and before[0] == by and now - before[1] < AGAIN_S:
            return
        first, self.going_on = self.request.ask() or self.going_on, False  # `changed` asked, and now it is for good
        if not first:
            if self.grace_s is not None and not self.request.asked():
                self.early = True
                self._say(f"{by.name}: {EARLY}")
            self.request.end()
            self.ended_by = by
            # Torch elastic ends the ranks by this signal. They ignore Ctrl-C, which a terminal sends to them, too.
            raise SignalException("ended", signal.SIGTERM)
        self._asked("" if by == signal.SIGINT else f"{by.name}: ", by)

    def _say(self, text: str) -> None:
        with suppress(OSError):  # print is not reentrant
            os.write(2, text.encode())

    def _asked(self, why: str, by: signal.Signals = signal.SIGTERM) -> None:
        self._say(why + (FINISHING if self.request.finishing() else self.said))
        if self.grace_s is not None:
            self._after(self.grace_s, lambda: self._grace_is_over(by))

    def _grace_is_over(self, by: signal.Signals) -> None:
        self._last = None
        os.kill(os.getpid(), by)

    def _time_is_over(self) -> None:
        if self.request.ask():
            self._asked("run.time_limit_s: ")
        elif not self.request.asked():  # nobody listens yet: a run stops after its first step
            self._after(LOOK_S, self._time_is_over)

    def _look(self) -> None:
        assert self.changed is not None
        if self.request.asked() or self.request.finishing():
            return
        why = self.changed()
        if why is not None:
            self.going_on = True  # before a signal can come that finds it asked
            if self.request.ask():
                self._say(f"{why}: {self.said}")
                return
            self.going_on = False
        self._after(LOOK_S, self._look)

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        if not self._over:
            self._timers = [timer for timer in self._timers if timer.is_alive()] + [in_time(seconds, then)]


def stopped_between() -> AbstractContextManager[None]:
    """Inside, where no ranks run that have their own `Signals`, STOPPING raise Stopped: there is nothing to save."""
    return _answered(_stopped)


def finished() -> AbstractContextManager[None]:
    """Inside, where a run is done but for a moment's work, STOPPING change nothing."""
    return _answered(lambda number, frame: None)


def _stopped(number: int, frame: object) -> None:
    raise Stopped


@contextmanager
def _answered(handler: Callable[[int, Any], None]) -> Iterator[None]:
    with kept():
        if threading.current_thread() is threading.main_thread():
            for one in STOPPING:
                if signal.getsignal(one) != signal.SIG_IGN:
                    signal.signal(one, handler)
        yield


@contextmanager
def kept() -> Iterator[None]:
    """Put back the handlers that torch elastic and `Signals` replace: a sweep's next point starts as the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in {*ENDING, *STOPPING}}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
