"""The jobs of commands whose ranks run a trained model without training it: generate, chat, serve, eval."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megapar.cli.command import Call
from megapar.config.errors import ConfigError
from megapar.config.run_schema import ForwardConfig, WriterConfig
from megapar.config.schema import TrainConfig

if TYPE_CHECKING:
    from megapar.data.tokenizer import Tokenizer
    from megapar.launch.rank import Job

F = TypeVar("F", bound=ForwardConfig)
W = TypeVar("W", bound=WriterConfig)


def resolve(config: F, world_size: int | None = None) -> tuple[F, TrainConfig]:
    """(the resolved config, that of its run). Refuses what ranks would. Raises UserError."""
    from megapar.cli.finish import refuse_missing_base
    from megapar.config import check_forward, resolve_forward
    from megapar.config.file import load_trained
    from megapar.launch.machine import num_gpus

    if config.run.dir is None:
        raise ConfigError("run.dir", None, "says which run's model it is; give run.dir=RUN")
    gpus = num_gpus()
    config = resolve_forward(config, num_gpus=gpus, world_size=world_size)
    folder = Path(str(config.run.dir))
    trained = load_trained(config)
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).is_dir():
        raise ConfigError("checkpoint.load", config.checkpoint.load, "no such folder; leave it out for the run's last")
    check_forward(config, trained, num_gpus=gpus, world_size=world_size)
    from megapar.checkpoint import find_checkpoint, read_manifest  # torch: only when nothing cheaper refuses

    refuse_missing_base(trained)

    read_manifest(find_checkpoint(config.checkpoint.load or folder))
    return config, trained


def resolve_writer(config: W, world_size: int | None = None) -> "tuple[W, TrainConfig, Tokenizer]":
    """The same of a model that writes, and the run's tokenizer."""
    config, trained = resolve(config, world_size)
    from megapar.generate.text import run_tokenizer

    return config, trained, run_tokenizer(Path(str(config.run.dir)), trained)


def job(config: ForwardConfig, trained: TrainConfig, call: Call, entry: str, name: str, **more: Any) -> "Job":
    """The job for the ranks. entry: the command's own; name: of the command, in the names of logs; more: other facts"""
    from megapar.cli.finish import rank_environment
    from megapar.config.file import dump
    from megapar.launch.rank import Job, name_of

    return Job(
        kind=name_of(type(config)),
        config=dump(config),
        entry=call.entry or entry,
        folder=str(config.run.dir),
        device=config.device,
        timeout_s=trained.train.timeout.total_seconds(),
        ranks=config.parallel.layout.world,
        log_name=f"{name}-rank",
        env=rank_environment(config.kernels.backend),
        **more,
    )
