"""Dynamic scheduling: where layers should live, by the times that the last steps took."""

from collections import defaultdict
from statistics import median

import torch
import torch.distributed as dist

from megapar.mesh import Mesh
from megapar.schedule.actions import Action
from megapar.schedule.partition import rebalanced
from megapar.trace.spans import LAYERS, Span, stage_of_layers


class StageTimes:
    """Collects what the actions of a rank's stages took, step after step, until layers are dealt out anew."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[int, str], list[float]] = defaultdict(list)

    def add(self, spans: list[Span]) -> None:
        for span in spans:
            if span.kind == LAYERS:
                self._seconds[stage_of_layers(span.name), LAYERS].append(span.seconds)
            elif span.kind in ("F", "B", "I", "W"):
                self._seconds[Action.parse(span.name).stage, span.kind].append(span.seconds)

    def layers(self, counts: list[int], mesh: Mesh) -> list[int]:
        """Layers per stage from now on; the times start anew. Collective, and the same on every rank.

        Of the replicas of a stage the slowest counts.
        """
        times = torch.tensor([self._stage(stage, count) for stage, count in enumerate(counts)], dtype=torch.float64)
        self._seconds.clear()
        times = times.to(mesh.device)
        if mesh.world_size > 1:
            dist.all_reduce(times, dist.ReduceOp.MAX, group=mesh["world"].group)
        layer, rest = times.t().tolist()
        of_layer = [seconds if count else None for seconds, count in zip(layer, counts, strict=True)]
        return rebalanced(counts, of_layer, rest)

    def _stage(self, stage: int, layers: int) -> tuple[float, float]:
        """Seconds of one layer and of the rest of a stage, forward and backward; zeros for one that is elsewhere.

        Backward is split between the layers and the rest as forward is.
        """
        if (stage, "F") not in self._seconds:
            return 0.0, 0.0
        medians = {kind: median(self._seconds.get((stage, kind), [0.0])) for kind in ("F", "B", "I", "W", LAYERS)}
        in_layers = medians[LAYERS] / medians["F"]
        whole = medians["F"] + (medians["B"] or medians["I"] + medians["W"])
        return (whole * in_layers / layers, whole * (1 - in_layers)) if layers else (0.0, whole)
