"""Every rank of a layout, one after the other in one process, over torch's fake process group.

    python -m tests.plan.replay             write tests/plan/golden anew (make replay)
    python -m tests.plan.replay --kernels   the compiled kernels' hashes (make replay-kernels)

A rank's part is built and stepped as `megapar train` does it; its peers are not there, so what it receives is zeros and
every value is nonsense. What it holds, and what it sends and asks for in which order, is not.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megapar.config.schema import TrainConfig
from tests.plan import reading
from tests.plan.layouts import LAYOUTS, config_of
from tests.plan.recorder import Operation, Recording, recording
from tests.plan.text import by_rank, fold, spans, wrapped
from tests.tiny import write_tokens

GOLDEN = Path(__file__).with_name("golden")


@contextmanager
def alone(rank: int, world_size: int) -> Iterator[None]:
    """The default process group as this rank of so many sees it, without the others."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


class RankPlan:
    """What one rank holds and does, each as lines."""

    def __init__(self, config: TrainConfig, rank: int, damage: AbstractContextManager[None]) -> None:
        with alone(rank, reading.world_of(config)), recording() as found, damage:
            trainer = reading.build(config, rank)
            built = found.take()
            reading.step(trainer)
            stepped = found.take()
            if config.train.eval_every:
                reading.evaluate(trainer)
            evaluated = found.take()
            names = _names(trainer, found)
            self.groups = [(names[id(group)], dist.get_process_group_ranks(group)) for group, _ in found.groups]
            self.made = [f"{names[id(group)]}: {options}" for group, options in found.groups]
            self.parameters, self.buckets = _parameters(trainer), _buckets(trainer)
            self.row = wrapped(reading.row(trainer))
            self.built = _lines(built, names)
            self.step = _lines(stepped, names)
            self.evaluation = _lines(evaluated, names)
            reading.close(trainer)


def plan(config: TrainConfig, damage: Callable[[], AbstractContextManager[None]] = nullcontext) -> str:
    """What all ranks of a layout hold and do, as text. damage: a context around what each rank does."""
    ranks = {rank: RankPlan(config, rank, damage()) for rank in range(reading.world_of(config))}
    lines = [f"{len(ranks)} ranks", *_members({rank: one.groups for rank, one in ranks.items()})]
    for title, of_one in {
        "Groups made": "made",
        "Parameters": "parameters",
        "Buckets": "buckets",
        "Schedule": "row",
        "While it is built": "built",
        "Step": "step",
        "Evaluation": "evaluation",
    }.items():
        found = {rank: getattr(one, of_one) for rank, one in ranks.items() if getattr(one, of_one)}
        lines += by_rank(title, found)
    return "\n".join(lines) + "\n"


def _names(trainer: reading.Trainer, found: Recording) -> dict[int, str]:
    """What every group is called, by its id: the axes that have it, or its number."""
    names = {id(group): f"group {number}" for number, (group, _) in enumerate(found.groups)}
    names.setdefault(id(dist.group.WORLD), "default")
    axes: dict[int, list[str]] = {}
    for name, group in reading.axes(trainer):
        axes.setdefault(id(group), []).append(name)
    return names | {group: "=".join(sorted(of_group)) for group, of_group in axes.items()}


def _members(groups: dict[int, list[tuple[str, list[int]]]]) -> Iterator[str]:
    """The ranks of every group by its name, and who made it, where that is not its members."""
    makers: dict[tuple[str, str], list[int]] = {}
    members: dict[tuple[str, str], list[int]] = {}
    for rank, made in groups.items():
        for name, ranks in made:
            place = (name, spans(ranks))
            makers.setdefault(place, []).append(rank)
            members[place] = ranks
    for name in dict.fromkeys(name for name, _ in makers):
        places = [place for place in makers if place[0] == name]
        strange = {place: makers[place] for place in places if makers[place] != members[place]}
        yield ""
        yield f"Ranks of {name}"
        yield from (f"  {line}" for line in wrapped([f"[{ranks}]" for _, ranks in places]))
        yield from (f"  [{ranks}] is made by rank {spans(by)}" for (_, ranks), by in strange.items())


def _lines(operations: list[Operation], names: dict[int, str]) -> list[str]:
    return fold([one.text(names[id(one.group)]) for one in operations])


def _parameters(trainer: reading.Trainer) -> list[str]:
    flat = reading.flat_tensors(trainer).items()
    lines = [f"flat {name}: {str(one.dtype).removeprefix('torch.')} {one.numel()}" for name, one in flat]
    for one in reading.held(trainer):
        box = ", ".join(f"{start}:{stop}" for start, stop in one.box)
        lines.append(f"{one.place} {one.name} {list(one.shape)}[{box}]")
    return lines


def _buckets(trainer: reading.Trainer) -> list[str]:
    return [
        f"{one.start}:{one.stop}, owned {one.first}:{one.last}, {' '.join(one.parameters)}"
        for one in reading.buckets(trainer)
    ]


def write(folder: Path) -> None:
    """Write every layout's plan to `folder`, and remove those of layouts that are no more."""
    folder.mkdir(exist_ok=True)
    for stale in {path.stem for path in folder.glob("*.txt")} - set(LAYOUTS):
        (folder / f"{stale}.txt").unlink()
    with tempfile.TemporaryDirectory() as data:
        prefix = write_tokens(Path(data))
        for name in LAYOUTS:
            (folder / f"{name}.txt").write_text(plan(config_of(name, prefix)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write down anew what every rank holds and does.")
    parser.add_argument("--kernels", action="store_true", help="the hashes of the compiled kernels instead")
    if parser.parse_args().kernels:
        from tests.plan import kernels

        kernels.write()
        return
    torch.set_num_threads(1)
    write(GOLDEN)


if __name__ == "__main__":
    main()
