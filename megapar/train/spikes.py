"""Values that stand out of those before: robust z-scores."""

from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

WINDOW = 100  # accepted steps that a new one is compared with
LEAST = 10  # of them, before any is judged
MOST = 10  # spikes in a row that are left out; one more is a new level, and the window begins anew
FIGURES = ("loss", "grad_norm")


def robust_z(value: float, others: Iterable[float]) -> float:
    """0.6745 * (value - median) / MAD, where MAD is the median of the distances to the median. For normal values
    MAD / 0.6745 is the standard deviation, but outliers among the others don't move it.

    Source: Iglewicz & Hoaglin 1993, How to Detect and Handle Outliers; they suggest 3.5 as the limit.
    A MAD below a millionth of the median counts as that: equal values with rounding are no measure.
    """
    others = list(others)
    middle = median(others)
    spread = max(median(abs(other - middle) for other in others), 1e-6 * abs(middle), 1e-300)
    return 0.6745 * (value - middle) / spread


class Window:
    """The figures of the last accepted steps. limit: of z; skip: whether a step with a larger one is left out."""

    def __init__(self, limit: float, skip: bool) -> None:
        self.limit, self.skip = limit, skip
        self.accepted: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        self.left_out = 0  # in a row

    def judge(self, *figures: float) -> dict[str, Any] | None:
        """Take up a step with these finite FIGURES. If it is a spike: its scores and whether it is left out."""
        scores = self._scores(figures)
        spike = any(z > self.limit for z in scores.values())
        found = {**scores, "skipped": self.skip and self.left_out < MOST} if spike else None
        self._take(figures, found)
        return found

    def again(self, row: Mapping[str, Any]) -> None:
        """Take up a step that was judged before, from its row in metrics.jsonl."""
        if None not in (figures := tuple(row[name] for name in FIGURES)):
            self._take(figures, row.get("spike"))

    def _take(self, figures: tuple[float, ...], spike: Mapping[str, Any] | None) -> None:
        if spike is not None and spike["skipped"]:
            self.left_out += 1
            return
        if spike is not None and self.skip:
            self.accepted.clear()
        self.left_out = 0
        self.accepted.append(figures)

    def _scores(self, figures: tuple[float, ...]) -> dict[str, float]:
        """z by name, `loss_z`; of too few steps none."""
        if len(self.accepted) < LEAST:
            return {}
        columns = zip(FIGURES, figures, zip(*self.accepted, strict=True), strict=True)
        return {f"{name}_z": robust_z(value, others) for name, value, others in columns}
