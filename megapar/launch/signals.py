"""Signals to the launcher. The first one asks ranks that listen to stop behind their step and save; the next one, the
end of `grace_s`, or the first where none listens, ends them."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from megapar.stop import StopRequest, in_time

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # torch elastic ends the ranks at these
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"))


LISTENS_S = 0.1  # between two looks whether the ranks listen by now


class Signals:
    """The launcher's handlers of STOPPING while ranks run.

    grace_s: seconds after a request to stop, after which the ranks are ended; None: Ctrl-C alone asks, and has no end
    said: printed at a request. ended_by: the signal that ended the ranks, if one did
    """

    def __init__(self, request: StopRequest, said: str, grace_s: float | None) -> None:
        self.request, self.grace_s, self.said = request, grace_s, said
        self.ended_by: signal.Signals | None = None
        self.taken: list[signal.Signals] = []
        self._timers: list[threading.Timer] = []

    @contextmanager
    def handled(self, stop_in: float | None = None) -> Iterator[None]:
        """Inside, signals are taken where that is possible: not outside the main thread, nor one that this process was
        started with ignored. stop_in: seconds after which the ranks are asked to stop without a signal."""
        if stop_in is not None:
            self._after(stop_in, self._time_is_over)
        if threading.current_thread() is threading.main_thread():
            ours = STOPPING if self.grace_s is not None else (signal.SIGINT,)
            self.taken = [one for one in ours if signal.getsignal(one) != signal.SIG_IGN]
            for one in self.taken:
                signal.signal(one, self._handle)
        try:
            yield
        finally:
            for timer in self._timers:
                timer.cancel()

    def _handle(self, number: int, frame: object) -> None:
        from torch.distributed.elastic.multiprocessing.api import SignalException

        if not self.request.ask():
            self.request.end()
            self.ended_by = signal.Signals(number)
            # Torch elastic ends the ranks by this signal. They ignore Ctrl-C, which a terminal sends to them, too.
            raise SignalException("ended", signal.SIGTERM)
        self._asked(signal.Signals(number))

    def _asked(self, by: signal.Signals | None) -> None:
        why = "" if by == signal.SIGINT else f"{by.name}: " if by else "run.time_limit_s: "
        with suppress(OSError):  # print is not reentrant
            os.write(2, f"{why}{self.said}".encode())
        if self.grace_s is not None:
            self._after(self.grace_s, lambda: os.kill(os.getpid(), by or signal.SIGTERM))

    def _time_is_over(self) -> None:
        if self.request.ask():
            self._asked(None)
        elif not self.request.asked():  # nobody listens yet: a run stops behind its first step
            self._after(LISTENS_S, self._time_is_over)

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        self._timers.append(in_time(seconds, then))


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
