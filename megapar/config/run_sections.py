"""Every key of a run's directory, its state on disk, and what it does when something goes wrong."""

from dataclasses import dataclass
from typing import Literal

from megapar.config.keys import option


@dataclass(frozen=True)
class CheckpointConfig:
    """State on disk."""

    every: int = option(0, "steps between checkpoints; 0: only at the end", at_least=0)
    every_minutes: float = option(
        0.0, "minutes between checkpoints, by the clock of rank 0; 0: by steps alone", at_least=0, identity=False
    )
    async_save: bool = option(
        False, "train on while a checkpoint is written, from a copy of the state in the host's memory", identity=False
    )
    replicate: bool = option(
        False,
        "also keep the state in shared memory of this host and the next, which restarts go on from without a disk",
        identity=False,
    )
    replicate_every: int = option(1, "steps between such copies", at_least=1, identity=False)
    on_error: Literal["stop", "warn"] = option(
        "stop",
        "of one that can't be written: end the run, or say so and train on; the last one always ends it",
        identity=False,
    )
    keep: int = option(0, "newest checkpoints to keep, of all that the run has written; 0: all", at_least=0)
    load: str | None = option(None, "checkpoint folder to start from, written in any layout", verbatim=True, path=True)
    weights: str | None = option(
        None,
        "checkpoint folder to take weights alone from, as for fine-tuning: step 0, on any data",
        verbatim=True,
        path=True,
    )


@dataclass(frozen=True)
class RunConfig:
    """The run directory."""

    name: str = option("run", "name of the run, part of the default directory", verbatim=True, identity=False)
    dir: str | None = option(
        None,
        "folder of everything the run writes; default: runs/DATE-TIME-NAME",
        verbatim=True,
        path=True,
        identity=False,
    )


@dataclass(frozen=True)
class TrainRunConfig(RunConfig):
    """The run directory, and what becomes of a run when something goes wrong."""

    time_limit_s: float | None = option(
        None,
        "seconds after which the run stops with a checkpoint, and exits with 85; default: none",
        above=0,
        identity=False,
    )
    grace_s: float = option(
        300.0,
        "seconds from a signal to stop (TERM, USR1, USR2, Ctrl-C) until the ranks are ended",
        above=0,
        identity=False,
    )
    max_restarts: int = option(
        0,
        "times that a run whose rank failed goes on by itself, from its newest checkpoint",
        at_least=0,
        identity=False,
    )
    elastic: bool = option(
        False,
        "run in the best layout for the ranks that there are; go on in another when slots_file changes",
        identity=False,
    )
    slots_file: str | None = option(
        None,
        "elastic: file with a number, how many ranks may run; default: as many as the layout has, or GPUs",
        verbatim=True,
        path=True,
        identity=False,
    )
    watchdog_s: float | None = option(
        None,
        "seconds after which an operation is stuck: who waits for whom is said, and the run ends; default: timeout_s",
        at_least=1,
        identity=False,
    )
    check_collectives: int = option(
        20,
        "first steps in which ranks of a host compare their collectives and transfers: name, shape, dtype, order",
        at_least=0,
        identity=False,
    )
    nonfinite_limit: int = option(
        20, "steps in a row skipped as gradients were not finite, before on_nonfinite", at_least=1, identity=False
    )
    on_nonfinite: Literal["stop", "rollback"] = option(
        "stop", "then: stop with an error, or go back to the last verified checkpoint", identity=False
    )
    spike_z: float = option(
        0.0, "robust z-score above which a loss or a gradient norm is a spike; 0: none is looked for", at_least=0
    )
    on_spike: Literal["log", "skip"] = option("log", "a spike is logged, or the step's update left out on all ranks")
    recheck_every: int = option(
        0,
        "steps between those whose gradients are computed twice and compared bit for bit; 0: none",
        at_least=0,
        identity=False,
    )
    replicas_every: int = option(
        0, "steps between comparisons of parameters that several ranks hold; 0: none", at_least=0, identity=False
    )
    samples_every: int = option(
        0,
        "steps between comparisons of the samples that several ranks read, with a hash of all in the row; 0: none",
        at_least=0,
        identity=False,
    )
    preflight: bool = option(
        False, "before the first step, test arithmetic, memory, disk, clocks and links of all ranks", identity=False
    )
