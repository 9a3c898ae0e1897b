"""Ranks that are late, and parts of the protocol that are missing: in the interpreter kernels are Python, and the
functions that they call can be replaced.

A place where a rank can be late is (number of a launch in an operation, step):

| step     | the rank is late                                                    |
|----------|---------------------------------------------------------------------|
| launched | before the launch begins                                            |
| begun    | after the handshake, before it writes to a peer                     |
| stored   | after it has written a tile to its peers, before the tile's flag    |
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from megapar.kernels._common import Launch
from megapar.kernels.comm import exchange
from megapar.kernels.comm import matmul as fused
from tests.kernels.comm.operations import LAUNCHES

Place = tuple[int, str]
PRIMITIVES = ("begin", "await_flag", "post")


def places_of(form: str) -> list[Place]:
    """Every place where a rank can be late in a form of `operations.FORMS`."""
    first = [(0, "launched"), (0, "begun"), (0, "stored"), (1, "launched")]
    return first + [(1, "stored"), (2, "launched")] * (LAUNCHES[form] == 3)


class Operation:
    """What this process runs, as it goes on. `late` is called with every place that it comes to.

    without: (kernel, primitive) pairs that do nothing.
    """

    def __init__(self, late: Callable[[Place], None], without: frozenset[tuple[str, str]] = frozenset()) -> None:
        self.late, self.without = late, without
        self.launches, self.kernel = 0, ""

    def begins(self) -> None:
        """The launches that follow are those of another operation."""
        self.launches = 0

    @contextmanager
    def watched(self) -> Iterator["Operation"]:
        with ExitStack() as patches:
            patches.enter_context(mock.patch.object(Launch, "run", self._launch(Launch.run)))
            for module in (exchange, fused):
                for name in PRIMITIVES:
                    if hasattr(module, name):
                        replaced = self._primitive(name, getattr(module, name))
                        patches.enter_context(mock.patch.object(module, name, replaced))
            yield self

    def _launch(self, run: Callable[[Launch], None]) -> Callable[[Launch], None]:
        def launch(one: Launch) -> None:
            self.kernel = one.kernel.fn.__name__
            self.late((self.launches, "launched"))
            self.launches += 1
            run(one)

        return launch

    def _primitive(self, name: str, original: Callable[..., None]) -> Callable[..., None]:
        def primitive(*args: Any) -> None:
            if name == "post":
                self.late((self.launches - 1, "stored"))
            if (self.kernel, name) not in self.without:
                original(*args)
            if name == "begin":
                self.late((self.launches - 1, "begun"))

        return primitive


class Once:
    """Late by `seconds` at one place, the first time it is passed."""

    def __init__(self, place: Place | None, seconds: float) -> None:
        self.place, self.seconds = place, seconds

    def __call__(self, place: Place) -> None:
        if place == self.place:
            self.place = None
            time.sleep(self.seconds)
