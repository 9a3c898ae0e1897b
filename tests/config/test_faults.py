"""What `fault.plan` refuses."""

from typing import Any

import pytest

from megapar.config.errors import ConfigError
from megapar.config.faults import Fault, faults

GOOD: dict[str, Any] = {"rank": 1, "step": 3, "phase": "fwd", "kind": "delay"}


def test_what_is_left_out() -> None:
    assert faults([GOOD]) == [Fault(1, 3, "fwd", "delay", nth=0, point="", seconds=1.0)]
    assert faults(None) == []


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ({"seconds": -1}, "seconds must be a number of at least 0"),
        ({"seconds": float("nan")}, "seconds must be a number of at least 0"),
        ({"seconds": "abc"}, "seconds must be a number of at least 0"),
        ({"point": 3}, "point must be a part of an operation's name"),
        ({"step": 0}, "step must be a whole number of at least 1"),
        ({"rank": True}, "rank must be a whole number of at least 0"),
        ({"rank": 4}, "there is no rank 4 among 4"),
        ({"kind": "kill"}, "no such kind; use sigkill, "),
        ({"phase": "forward"}, "no such phase; use fwd, "),
        ({"kind": "nonfinite", "phase": "bwd"}, "nonfinite would change nothing there; use phase opt"),
        ({"where": 1}, "has 'where'; may have rank, step, phase, kind, nth, point, seconds"),
    ],
)
def test_what_is_no_fault(entry: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=r"fault\.plan") as caught:
        faults([GOOD, GOOD | entry], 4)
    assert f"entry 1: {problem}" in str(caught.value)


def test_what_lacks() -> None:
    with pytest.raises(ConfigError, match="entry 0: lacks 'kind'; give rank, step, phase, kind"):
        faults([{"rank": 0, "step": 1, "phase": "fwd"}])
