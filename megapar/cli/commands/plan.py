"""`megapar plan`: what one rank of a layout would hold and do. Nothing is trained, and no other rank is needed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megapar.cli.command import Call, Command
from megapar.config.keys import option
from megapar.config.schema import TrainConfig

if TYPE_CHECKING:
    from megapar.plan.rank import RankPlan


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """`megapar plan`: what one rank of a layout would hold and do."""

    rank: int = option(0, "the rank, of all ranks of the layout", at_least=0)
    out: str | None = option(None, "file for the plan as JSON", verbatim=True, path=True, identity=False)


def run(config: PlanConfig, call: Call) -> int:
    """Print the plan of a rank. Returns the exit code."""
    from megapar.cli.output import refuse_bad_out, say
    from megapar.config import resolve
    from megapar.config.check import check_plan

    refuse_bad_out(config.out, None)
    from megapar.data.tokenizer.train import BYTE_ENTRIES, BYTES

    size = BYTE_ENTRIES if config.data.tokenizer == BYTES else config.data.vocab_size
    if config.model.vocab_size is None:
        say(f"model.vocab_size is not given: counted with data.vocab_size={size}")
    resolved = resolve(config, vocab_size=config.model.vocab_size or size)
    check_plan(resolved, config.rank)
    from megapar.plan.rank import plan_rank

    found = plan_rank(resolved, config.rank)
    if config.out is not None:
        Path(config.out).write_text(json.dumps(found.as_json(), indent=1) + "\n", encoding="utf-8")
    print(text(found, resolved))
    return 0


def text(found: "RankPlan", config: TrainConfig) -> str:
    """A plan as it is shown on the terminal."""
    from megapar.config.model import model_weights
    from megapar.plan.rank import shortened

    layout = config.parallel.layout
    place = ", ".join(f"{axis} {index}" for axis, index in found.coordinates.items())
    total = sum(found.bytes.values())
    state = ", ".join(f"{kind} {_size(number)}" for kind, number in found.bytes.items())
    lines = [
        ("rank", f"{found.rank} of {layout.world} in {layout}: {place}"),
        *(("stage", f"{stage}: {_runs(names)}") for stage, names in found.parts.items()),
        ("parameters", f"{found.parameters:,} on this rank, {model_weights(config):,} in the model"),
        ("memory", f"{_size(total)}: {state}; activations are an estimate"),
        ("actions", shortened(found.row)),
    ]
    for number, (axis, sent) in enumerate(found.messages.items()):
        lines.append(("" if number else "messages", f"{axis}: {sent.count:,} in a step, {_size(sent.bytes)}"))
    for number, (axis, ranks) in enumerate(found.groups.items()):
        shown = ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{len(ranks)} ranks, {ranks[0]} to {ranks[-1]}"
        lines.append(("" if number else "groups", f"{axis}: {shown}"))
    return "\n".join(f"{name:<12}{line}" for name, line in lines)


def _runs(names: list[str]) -> str:
    """Names of parts, layers in a row together: `embedding, layers.0-3`."""
    shown: list[str] = []
    first = last = None
    for name in [*names, ""]:
        number = int(name.removeprefix("layers.")) if name.startswith("layers.") else None
        if first is not None and last is not None and number != last + 1:
            shown.append(f"layers.{first}" if first == last else f"layers.{first}-{last}")
            first = None
        if number is None:
            shown += [name] if name else []
        elif first is None:
            first = number
        last = number
    return ", ".join(shown)


def _size(number: float) -> str:
    """Bytes in a unit that leaves one to three digits in front of the point."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError


COMMAND = Command(
    name="plan",
    config=PlanConfig,
    run=run,
    order=5,
    about="what one rank of a layout would hold and send, in seconds and for any number of ranks",
    examples=[
        ("megapar plan parallel=tp2pp2dp2", "rank 0 of eight"),
        ("megapar plan model=gpt2_small parallel=tp4pp4 rank=15 out=plan.json", "the last of 16, also as JSON"),
    ],
    most_used=[
        *("rank", "parallel.tp", "parallel.pp", "parallel.dp", "parallel.zero", "pipeline.schedule", "model.layers"),
        *("model.hidden", "train.dtype", "train.global_batch_size", "out"),
    ],
)
