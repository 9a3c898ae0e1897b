"""Ranks that compute more slowly than others with the same work, by the medians of the last steps."""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from megapar.config.layout import AXES, RANK_ORDER

WINDOW = 15  # steps that a median is taken over; none is named before
SLOW = 1.5  # times as long as those with the same work, or as measured costs say
SLOW_BY_ESTIMATE = 3.0  # times as long as operations alone explain: a stage's memory traffic is not counted


class Stragglers:
    """Whom a rank is compared with: those that do the same with other samples; without any, those that hold other parts
    of the same matrices; without those too, the ranks of other stages, by what their stages cost.

    costs: of every pipeline rank's stages, in any unit; measured: whether they are, or estimated from operations
    """

    def __init__(self, costs: Sequence[float], *, measured: bool) -> None:
        self.costs, self.measured = torch.tensor(costs, dtype=torch.float64), measured
        self._ratios: deque[Tensor] = deque(maxlen=WINDOW)

    def slow(self, seconds: Tensor) -> list[int]:
        """Ranks that are slow, with one more step taken up. seconds [*sizes in RANK_ORDER] fp64: of computation.

        A rank's score is the median over the last WINDOW steps of its seconds by the median of its peers (of two ranks
        by the other's): a single slow step, or a single slow peer, moves neither.
        """
        limit = SLOW
        for splits in (("samples", "tokens"), ("weights",), ("layers",)):
            dims = [dim for dim, name in enumerate(RANK_ORDER) if AXES[name].splits in splits]
            if any(seconds.shape[dim] > 1 for dim in dims):
                break
        else:
            return []
        if "layers" in splits:
            limit = SLOW if self.measured else SLOW_BY_ESTIMATE
            seconds = seconds / self.costs.view([-1 if dim in dims else 1 for dim in range(seconds.dim())])
        self._ratios.append(_by_peers(seconds, dims))
        if len(self._ratios) < WINDOW:
            return []
        scores = torch.stack(list(self._ratios)).median(0).values
        return (scores.reshape(-1) >= limit).nonzero().squeeze(1).tolist()


def _by_peers(seconds: Tensor, dims: Sequence[int]) -> Tensor:
    """By the median along these dims; of two by the other one."""
    last = range(-len(dims), 0)
    moved = seconds.movedim(list(dims), list(last))
    peers = moved.flatten(-len(dims))
    usual = peers.flip(-1) if peers.shape[-1] == 2 else peers.quantile(0.5, -1, keepdim=True)
    return (peers / usual.clamp_min(1e-9)).view(moved.shape).movedim(list(last), list(dims))
