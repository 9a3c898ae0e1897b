"""V schedules from a repeated block (Qi et al. 2024, "Pipeline Parallelism with Controllable Memory", sections 3, 4).

Rank r of p holds stage r, on the way there, and stage 2p-1-r, on the way back. One micro-batch's F and I passes form a
block: it moves from rank to rank at a fixed pace, and the next micro-batch's block follows 6 slots later, as a rank has
six passes per micro-batch, F, I and W of two stages. The length of a block says how many micro-batches overlap, and so
how much memory is held; that both legs share every rank makes it the same on all ranks.
"""

from dataclasses import dataclass
from itertools import product

from megapar.schedule.actions import Action, Rows, v_placement
from megapar.schedule.fill import fill_weights
from megapar.schedule.generator import Problem

PERIOD = 6


@dataclass(frozen=True)
class Pace:
    """Slots from one rank to the next: forward there and back, then backward there and back.

    A micro-batch is held for about p * (sum of the four) slots by the two stages of a rank, so a rank holds
    sum / 6 * p stages' worth of activations, that is sum / 12 * p micro-batches' worth of a whole rank.
    """

    forward_there: int
    forward_back: int
    backward_there: int
    backward_back: int


def v_block(problem: Problem, pace: Pace, limit: float) -> Rows:
    """Rows of a V schedule: F and I in the block's order, W filled in under `limit` micro-batches' worth a rank."""
    p, m = problem.ranks, problem.microbatches
    rows = []
    for rank, (first, second, third, fourth) in enumerate(_block(p, pace)):
        far = 2 * p - 1 - rank
        passes = [(first, rank, "F"), (second, far, "F"), (third, far, "I"), (fourth, rank, "I")]
        slots = sorted((slot + PERIOD * i, Action(stage, kind, i)) for slot, stage, kind in passes for i in range(m))
        rows.append([action for _, action in slots])
    return fill_weights(rows, v_placement(p), problem.costs, [limit] * p)


def _block(p: int, pace: Pace) -> list[tuple[int, int, int, int]]:
    """The slots of a rank's four passes, for every rank: the shortest block whose passes never meet in a slot."""
    best: tuple[int, list[tuple[int, int, int, int]]] | None = None
    for turn, loss, turn_back in product(range(1, PERIOD + 1), repeat=3):
        slots = []
        for rank in range(p):
            back = p - 1 - rank
            first = pace.forward_there * rank
            second = pace.forward_there * (p - 1) + turn + pace.forward_back * back
            third = (
                pace.forward_there * (p - 1) + turn + pace.forward_back * (p - 1) + loss + pace.backward_there * rank
            )
            end = pace.forward_there + pace.forward_back + pace.backward_there
            fourth = end * (p - 1) + turn + loss + turn_back + pace.backward_back * back
            slots.append((first, second, third, fourth))
            if len({slot % PERIOD for slot in slots[-1]}) < 4:
                break
        else:
            length = turn + loss + turn_back
            if best is None or length < best[0]:
                best = (length, slots)
    assert best is not None, f"{pace}: passes collide on {p} ranks whatever the turns"
    return best[1]
