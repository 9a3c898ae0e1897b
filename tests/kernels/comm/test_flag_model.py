"""Every execution of the protocol's specification; and with a part of the protocol missing, what goes wrong in some."""

from typing import Any

import pytest

from tests.kernels.comm.flag_model import OPERATIONS, Protocol, explore

EPOCHS = 4  # a half is used again in the third, and the other one in the fourth
PARTS = ("begin tells", "begin waits", "push tells", "reduce tells", "reduce waits", "collect waits", "product waits")
MUTANTS: dict[str, dict[str, Any]] = {
    **{f"no {part}": {"without": frozenset({part})} for part in PARTS},
    **{f"{part} for any epoch": {"any_epoch": frozenset({part})} for part in PARTS if part.endswith("waits")},
    "no handshake": {"without": frozenset({"begin tells", "begin waits"})},
    "one half of data": {"one_half": frozenset({"tile"})},
    "one half of flags": {"one_half": frozenset({"flag"})},
}
SHOWS = {
    "no reduce waits": "read before it is written",
    "no collect waits": "read before it is written",
    "no product waits": "read before it is written",
    "no begin tells": "deadlock",
    "no push tells": "deadlock",
    "no reduce tells": "deadlock",
    "no begin waits": "overwritten before it is read",
    "no handshake": "overwritten before it is read",
}


def equivalent(operation: str, mutant: str) -> bool:
    """Whether nothing can go wrong all the same."""
    if mutant in ("no begin waits", "begin waits for any epoch", "no handshake"):
        # Whoever has done with an epoch has heard in it from every other rank, which had then done with the one before.
        return "idle" not in operation
    if mutant == "one half of data":
        # All results are there when all ranks have read all summands, and the next results need summands of every rank,
        # which it sends when it has read these.
        return operation in ("sums to owner, and to all", "sums of one row")
    # A flag's only writer sets it to ever more, as long as it has one only.
    return mutant == "one half of flags" and "two shapes" not in operation


def has_part(operation: str, mutant: str) -> bool:
    """Whether the operation has what the mutant breaks."""
    missing = {part for part in PARTS if part in mutant}
    launches = OPERATIONS[operation](Protocol(2), 0, 1)
    return missing <= {step.part for launch in launches for program in launch for step in program}


BROKEN = [(operation, mutant) for operation in OPERATIONS for mutant in MUTANTS if has_part(operation, mutant)]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_goes_wrong(operation: str) -> None:
    """Two ranks in every order; three in every order of writes and reads, and of all steps where it takes a second.
    Three ranks with four tiles each have too many orders."""
    assert explore(Protocol(2), operation, EPOCHS).wrong == ""
    if operation != "sums to owner, two shapes":
        assert explore(Protocol(3), operation, EPOCHS, reduced=True).wrong == ""
    if operation in ("sums to all", "sums of one row", "gather", "gather, idle"):
        assert explore(Protocol(3), operation, 3).wrong == ""


@pytest.mark.parametrize("operation, mutant", BROKEN)
def test_mutants(operation: str, mutant: str) -> None:
    """What is missing shows on two ranks as on three, unless nothing can go wrong; and the reduced exploration, which
    is the one that three ranks rely on, finds what the full one does."""
    found = [explore(Protocol(2, **MUTANTS[mutant]), operation, EPOCHS, reduced).wrong for reduced in (False, True)]
    if not equivalent(operation, mutant):
        found.append(explore(Protocol(3, **MUTANTS[mutant]), operation, EPOCHS, reduced=True).wrong)
        assert all(wrong.startswith(SHOWS.get(mutant, "")) and wrong for wrong in found), found
    else:
        assert found == ["", ""]


def test_a_half_is_needed_for_two_epochs_only() -> None:
    """Three epochs are needed to see that the handshake is, and two don't do."""
    broken = Protocol(2, without=frozenset({"begin waits"}))
    assert [explore(broken, "gather, idle", epochs).wrong == "" for epochs in (2, 3)] == [True, False]
