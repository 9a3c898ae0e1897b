"""Slow ranks: in the rows of the steps, and in the summary."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_costs
from megapar.train.hooks.hook import Hook, Seen
from megapar.train.metrics import compute_seconds
from megapar.train.stragglers import Stragglers

if TYPE_CHECKING:
    from megapar.train.loop import Loop


class SlowRanks(Hook):
    """On rank 0, from the figures that all ranks gather anyway."""

    order = 14

    def __init__(self, loop: "Loop") -> None:
        super().__init__(loop)
        self.steps = 0
        self.named: Counter[int] = Counter()
        self.moved()

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return config.parallel.layout.world > 1

    def moved(self) -> None:
        config, schedule = self.loop.config, self.loop.trainer.schedule
        costs = stage_costs(config)
        of_stages = list(map(sum, zip(costs.forward, costs.input_grad, costs.weight_grad, strict=True)))
        of_ranks = [sum(of_stages[stage] for stage in schedule.stages_of(rank)) for rank in range(len(schedule.rows))]
        self.watch = Stragglers(of_ranks, measured=config.pipeline.costs is not None)

    def read(self, seen: Seen) -> dict[str, Any]:
        if self.loop.writer is None:
            return {}
        slow = self.watch.slow(compute_seconds(seen.figures))
        self.steps += 1
        self.named.update(slow)
        return {"stragglers": slow} if slow else {}

    def finish(self) -> dict[str, Any]:
        """stragglers: the share of this start's steps in which a rank was slow, by rank."""
        return {"stragglers": {str(rank): count / self.steps for rank, count in sorted(self.named.items())}}


HOOK = SlowRanks
