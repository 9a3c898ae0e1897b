"""Schedules for tests: every generator with sizes that it takes, and tables written as text."""

from collections.abc import Iterator

from megapar.schedule.actions import Action, Schedule
from megapar.schedule.build import generators, refusal

NAMES = list(generators())


def chunks_of(name: str, most: int = 4) -> list[int]:
    """The stages per rank that a schedule takes, up to `most`."""
    return [chunks for chunks in range(1, most + 1) if chunks in generators()[name].chunks]


def sizes(name: str, ranks: range, microbatches: range, most_chunks: int = 4) -> Iterator[tuple[int, int, int]]:
    """(ranks, micro-batches, chunks) of every combination that a schedule takes."""
    for p in ranks:
        for m in microbatches:
            for chunks in chunks_of(name, most_chunks):
                if refusal(name, p, m, chunks) is None:
                    yield p, m, chunks


def table(*texts: str) -> Schedule:
    """A schedule from its rows, `0F0 0SEND_F0 ...`."""
    rows = tuple(tuple(Action.parse(word) for word in text.split()) for text in texts)
    actions = [action for row in rows for action in row]
    return Schedule(1 + max(a.stage for a in actions), 1 + max(a.microbatch for a in actions), rows)
