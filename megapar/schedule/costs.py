"""What the actions of a pipeline cost: time by stage and kind, transfers, memory."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from megapar.schedule.actions import ScheduleError
from megapar.schedule.partition import uniform
from megapar.schedule.table import refuse_special


@dataclass(frozen=True)
class Costs:
    """Costs by stage, in model order. Any unit of time, the same for all; memory in any unit, too.

    forward, input_grad, weight_grad: time of F, I and W of each stage; B takes I + W
    activation: memory that one micro-batch's forward leaves behind on each stage
    kept: share of it that I leaves for W (1: I frees nothing)
    reduce: time of REDUCE of each stage, as far as backward does not hide it
    latency: time from a send to its arrival, whatever the size; transfer: bytes / bandwidth, during which a channel is
        busy. A channel is one direction between two ranks for activations, or for gradients.
    overlap: transfers run beside computation; without it a sender computes nothing during `transfer`
    tied: time of one more reduction between the ranks of the first and the last stage, at the end of the step
    embedding, head: what of the first stage's and of the last stage's forward, input_grad and weight_grad is theirs
    """

    forward: tuple[float, ...]
    input_grad: tuple[float, ...]
    weight_grad: tuple[float, ...]
    activation: tuple[float, ...]
    reduce: tuple[float, ...]
    kept: float = 1.0
    latency: float = 0.0
    transfer: float = 0.0
    overlap: bool = True
    tied: float = 0.0
    embedding: tuple[float, float, float] = (0.0, 0.0, 0.0)
    head: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def stages(self) -> int:
        return len(self.forward)

    @classmethod
    def even(
        cls,
        ranks: int,
        stages: int,
        *,
        F: float = 1.0,
        I: float = 1.0,  # noqa: E741 (the action's name)
        W: float = 1.0,
        embedding: float = 0.0,
        head: float = 0.0,
        reduce: float = 0.0,
        kept: float = 1.0,
        latency: float = 0.0,
        transfer: float = 0.0,
        overlap: bool = True,
        tied: float = 0.0,
    ) -> "Costs":
        """Layers spread evenly: F, I, W and reduce are those of one rank's share, memory is 1 a rank and micro-batch.

        embedding: what the first stage has on top, as a share of a rank's F and W (no input gradient is taken there)
        head: what the last stage has on top, as a share of a rank's F, I and W
        """
        share = ranks / stages
        more = [0.0] * stages
        more[-1] += head
        first = more.copy()
        first[0] += embedding
        return cls(
            forward=tuple(F * (share + extra) for extra in first),
            input_grad=tuple(I * (share + extra) for extra in more),
            weight_grad=tuple(W * (share + extra) for extra in first),
            activation=(share,) * stages,
            reduce=(reduce * share,) * stages,
            kept=kept,
            latency=latency,
            transfer=transfer,
            overlap=overlap,
            tied=tied,
        )

    def refuse(self, stages: int) -> str | None:
        """Why these can't be the costs of this many stages; None if they can."""
        return f"costs of {self.stages} parts of the model can't fill {stages} stages" if stages > self.stages else None

    def merged(self, stages: int) -> "Costs":
        """The same model cut into stages, as evenly as its parts allow. Raises ScheduleError for too few of them."""
        if why := self.refuse(stages):
            raise ScheduleError(why)
        return self.cut(uniform(self.stages, stages))

    def normalised(self, ranks: int) -> "Costs":
        """The same in another unit of time, in which F of all layers on a rank takes 1 on average."""
        unit = sum(self.forward) / ranks
        times = {
            name: tuple(value / unit for value in getattr(self, name)) for name in BY_STAGE if name != "activation"
        }
        scaled = {name: getattr(self, name) / unit for name in ("latency", "transfer", "tied")}
        return replace(self, **times, **scaled, embedding=NOTHING, head=NOTHING)  # type: ignore[arg-type]

    def apart(self) -> "Costs":
        """The same with the embedding and the head as stages of their own."""
        ends = dict(zip(BY_STAGE, zip(self.embedding, self.head, strict=True), strict=False))

        def apart(name: str) -> tuple[float, ...]:
            values = list(getattr(self, name))
            embedding, head = ends.get(name, (0.0, 0.0))
            values[0] -= embedding
            values[-1] -= head
            return (embedding, *(max(0.0, value) for value in values), head)

        return replace(self, **{name: apart(name) for name in BY_STAGE}, embedding=NOTHING, head=NOTHING)  # type: ignore[arg-type]

    def cut(self, counts: Sequence[int], speed: Sequence[float] | None = None) -> "Costs":
        """Stages of counts[s] parts each, such as layers; times are divided by the speed of each stage's device."""
        assert sum(counts) == self.stages, f"{counts} of {self.stages} parts"
        ends = list(accumulate(counts))
        speed = speed or [1.0] * len(counts)

        def cut(name: str) -> tuple[float, ...]:
            values, by = getattr(self, name), [1.0] * len(counts) if name == "activation" else speed
            parts = zip(ends, counts, by, strict=True)
            return tuple(sum(values[end - count : end]) / of_device for end, count, of_device in parts)

        return replace(self, **{name: cut(name) for name in BY_STAGE}, embedding=NOTHING, head=NOTHING)  # type: ignore[arg-type]


NOTHING = (0.0, 0.0, 0.0)
TRIPLES = ("embedding", "head")
BY_STAGE = ("forward", "input_grad", "weight_grad", "activation", "reduce")


def read_costs(path: str, ranks: int) -> Costs:
    """Costs from a JSON file of the fields of Costs: `{"forward": [...], "input_grad": [...], "weight_grad": [...]}`.

    The lists have a number for each part of the model (a layer, a stage), all equally long. Without `activation` memory
    is 1 a rank and micro-batch; whatever else is left out has Costs' default. Raises ScheduleError.
    """
    refuse_special(Path(path), "costs")
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ScheduleError(f"{path}: not readable as costs: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ScheduleError(f"{path}: no JSON: {error}") from None
    if not isinstance(data, dict):
        raise ScheduleError(f"{path}: needs an object with the lists {', '.join(BY_STAGE[:3])}")
    known = {field.name for field in fields(Costs)}
    if unknown := sorted(set(data) - known):
        raise ScheduleError(f"{path}: unknown {unknown[0]}; it may have {', '.join(sorted(known))}")
    if missing := [name for name in BY_STAGE[:3] if name not in data]:
        raise ScheduleError(f"{path}: {missing[0]} is missing")
    read = {name: _of_file(path, name, value) for name, value in data.items()}
    lists = {name: value for name, value in read.items() if name in BY_STAGE}
    parts = len(lists["forward"])
    if any(len(values) != parts for values in lists.values()):
        raise ScheduleError(f"{path}: lists of different length: { ({k: len(v) for k, v in lists.items()}) }")
    if not 0 < sum(lists["forward"]) < _LARGEST:
        raise ScheduleError(f"{path}: forward adds up to nothing")
    return Costs(**{"activation": (ranks / parts,) * parts, "reduce": (0.0,) * parts} | read)


def _of_file(path: str, name: str, value: Any) -> Any:
    """A field's value from JSON: a list of numbers, a number, or for `overlap` true or false."""
    if name == "overlap":
        if not isinstance(value, bool):
            raise ScheduleError(f"{path}: overlap is {value!r}; use true or false")
        return value
    several = name in BY_STAGE or name in TRIPLES
    if isinstance(value, list) != several or value == [] or (name in TRIPLES and len(value) != 3):
        raise ScheduleError(f"{path}: {name} must be {'a list of numbers' if several else 'a number'}")
    for each in value if several else [value]:
        if isinstance(each, bool) or not isinstance(each, int | float) or not 0 <= each < _LARGEST:
            raise ScheduleError(f"{path}: {name} has {str(each)[:40]}; a cost is a number of at least 0")
    if name == "kept" and value > 1:
        raise ScheduleError(f"{path}: kept is {value:g}, a share; use at most 1")
    return tuple(map(float, value)) if several else float(value)


_LARGEST = 1e15  # of a cost: sums of what is more lose the digits of what is less


def write_costs(costs: Costs, path: Path) -> None:
    """Write costs as `read_costs` reads them, to six digits."""
    data = {
        name: value
        if isinstance(value, bool)
        else [float(f"{each:.6g}") for each in value]
        if name in BY_STAGE or name in TRIPLES
        else value
        for name, value in asdict(costs).items()
    }
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")
