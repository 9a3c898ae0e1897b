"""The keys of `megapar schedule`."""

from dataclasses import dataclass

from megapar.config.keys import group, option


@dataclass(frozen=True)
class ScheduleChoice:
    """Which schedule to look at."""

    schedule: str = option("all", "all: compare every schedule; or one: a name, auto, or csv:PATH")


@dataclass(frozen=True)
class CostsConfig:
    """What the actions of a pipeline cost, in any unit of time; F, I, W and reduce are those of one rank's layers."""

    F: float = option(1.0, "forward of one micro-batch through a rank's layers", above=0)
    I: float = option(1.0, "its input gradients", above=0)  # noqa: E741 (the action's name)
    W: float = option(1.0, "its weight gradients", above=0)
    embedding: float = option(0.0, "what the first stage has on top, as a share of a rank's F and W", at_least=0)
    head: float = option(0.0, "what the last stage has on top, as a share of a rank's F, I and W", at_least=0)
    reduce: float = option(0.0, "gradient reduction that backward does not hide", at_least=0)
    kept: float = option(1.0, "share of a micro-batch's activations that stays from I to W", at_least=0, at_most=1)
    latency: float = option(0.0, "time until a sent message arrives, whatever its size", at_least=0)
    transfer: float = option(0.0, "bytes / bandwidth of one message between stages", at_least=0)
    overlap: bool = option(True, "transfers run beside computation")
    tied: float = option(
        0.0, "one more reduction between the first and the last stage, for tied embeddings", at_least=0
    )
    file: str | None = option(
        None,
        "JSON with the costs of each layer or stage in place of all these: forward, input_grad, weight_grad lists",
        verbatim=True,
        path=True,
    )


@dataclass(frozen=True)
class ScheduleConfig:
    """`megapar schedule`: compare, write or draw pipeline schedules. Nothing is trained."""

    pipeline: ScheduleChoice = group(ScheduleChoice, "the schedule")
    stages: int = option(8, "pipeline ranks; the stages of the model are this times chunks", at_least=1, at_most=4096)
    microbatches: int = option(32, "micro-batches of a step", at_least=1, at_most=65536)
    chunks: int | None = option(
        None, "stages per rank of schedules that let you choose; default: their own", at_least=1, at_most=256
    )
    costs: CostsConfig = group(CostsConfig, "what the actions cost")
    memory_limit: float | None = option(
        None, "most activations of a rank, in micro-batches; auto keeps to it, others are marked", above=0
    )
    csv: str | None = option(
        None, "file to write the chosen schedule to: a row per rank, cells such as 2F0", verbatim=True, path=True
    )
    plot: str | None = option(
        None, "file to draw the chosen schedule's timeline to: .svg or .html", verbatim=True, path=True
    )
    out: str | None = option(None, "file for the comparison as JSON", verbatim=True, path=True, identity=False)
