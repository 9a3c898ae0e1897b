"""What a launcher asks of its machine before it starts ranks."""

import resource

import pytest

from megapar.config.errors import UserError
from megapar.launch.machine import OPEN_FILES, allow_open_files


def test_too_few_open_files_are_refused_before_a_rank_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (64, 64))
    with pytest.raises(
        UserError, match="64 open files are allowed, which is too few for 8 ranks; allow 192: ulimit -n"
    ):
        allow_open_files(8)


def test_as_many_as_the_system_grants_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limits: given.append(limits))
    for limits in ((64, 4096), (64, resource.RLIM_INFINITY), (1 << 20, 1 << 20)):
        monkeypatch.setattr(resource, "getrlimit", lambda what, limits=limits: limits)
        allow_open_files(8)
    assert given == [(4096, 4096), (OPEN_FILES, resource.RLIM_INFINITY)]  # and never fewer than before
