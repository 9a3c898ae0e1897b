"""The error of a run whose ranks had started."""


class RankFailure(Exception):
    """A rank failed. `str` is the traceback of the rank at fault, if it left one, then a line naming rank and log."""
