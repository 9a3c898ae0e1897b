"""DualPipeV: DualPipe (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", 3.2.1) folded into a V.

DualPipe feeds micro-batches from both ends of the pipeline, so that a rank works on one direction's forward beside the
other's backward. Cut in half, the second direction is the way back of a V, and each rank holds one copy of two stages.
"""

from itertools import count

from megapar.schedule.actions import Action, Row, Rows
from megapar.schedule.generator import Generator, Problem


def dualpipe_v(problem: Problem) -> Rows:
    """Forward of one leg beside backward of the other; W is split off only where it fills a bubble.

    F and B stand next to each other in the middle, so that the communication of one can hide behind the computation of
    the other. For F = I = W the step takes m * (F + I + W) and the way to the last rank, (p-1) * F/2. Every rank holds
    2p + 1 stages' activations, p + 1/2 micro-batches' worth.
    """
    return [_row(problem.ranks, problem.microbatches, rank) for rank in range(problem.ranks)]


def _row(p: int, m: int, rank: int) -> Row:
    there, back = rank, 2 * p - 1 - rank  # the rank's two stages
    after = p - 1 - rank  # ranks that follow on the way there
    row: Row = []
    forward, backward = ({there: count(), back: count()} for _ in "FB")  # the next micro-batch
    deferred: list[Action] = []

    def run(text: str, times: int) -> None:
        """F, B or I of a stage, 0 (there) or 1 (back); W of the oldest I."""
        for word in text.split() * times:
            if word == "W":
                row.extend(deferred[:1])
                del deferred[:1]
                continue
            kind, stage = word[0], back if word[1] == "1" else there
            action = Action(stage, kind, next((forward if kind == "F" else backward)[stage]))
            row.append(action)
            if kind == "I":
                deferred.append(Action(stage, "W", action.microbatch))

    run("F0", 2 * after)  # fill the way there
    run("F0 F1", rank + 1)  # the first ones come back
    # Their backwards begin; an I is sent on sooner than a B, and there is no bubble to keep W for.
    run("I1 W F1", after)
    run("F0 B1 F1 B0", m - 2 * p + rank + 1)  # full: one leg's F beside the other's B
    run("B1 F1 B0", after)  # no F is left on the way there
    # Only backwards are left: full ones in the first half, then I, which frees the next rank sooner.
    run("B1 B0", (rank + 1) // 2)
    run("B1 I0", (rank + 1) % 2)
    run("I1 I0", (rank + 1) // 2)
    run("W I0", after)
    run("W", rank + 1)
    return row


def refuse(ranks: int, microbatches: int, chunks: int) -> str | None:
    if microbatches < 2 * ranks:
        return f"needs at least 2 * {ranks} ranks = {2 * ranks} micro-batches, not {microbatches}"
    return None


SCHEDULE = Generator(
    "dualpipe_v",
    "V of two stages a rank: one leg's F beside the other's B, hides communication",
    dualpipe_v,
    chunks=range(2, 3),
    refuse=refuse,
)
