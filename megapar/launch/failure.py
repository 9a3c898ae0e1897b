"""How runs end whose ranks had started, besides being done."""

STOPPED = (
    85  # exit code of a run that was asked to stop, and whose state, if it has one, is saved: start it again to go on
)


class RankFailure(Exception):
    """A rank failed. `str` is the traceback of the rank at fault, if it left one, then a line naming rank and log.

    line: that line
    asked: the run had been asked to stop, and is not to start again
    """

    asked = False

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.line = text.splitlines()[-1]


class Stopped(KeyboardInterrupt):
    """The ranks have stopped as they were asked to, and saved their state, if there was any to save."""


class GoingOn(Stopped):
    """They have stopped so that the run goes on in another layout."""


def exit_code(interruption: KeyboardInterrupt) -> int:
    return STOPPED if isinstance(interruption, Stopped) else 130
