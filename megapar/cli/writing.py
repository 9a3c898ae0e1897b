"""The jobs of commands whose ranks write text: generate, chat, serve."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megapar.cli.command import Call
from megapar.config.errors import ConfigError
from megapar.config.schema import ChatConfig, GenerateConfig, ServeConfig, TrainConfig

if TYPE_CHECKING:
    from megapar.data.tokenizer import Tokenizer
    from megapar.launch.rank import Job

W = TypeVar("W", GenerateConfig, ChatConfig, ServeConfig)


def resolve_writer(config: W, world_size: int | None = None) -> "tuple[W, TrainConfig, Tokenizer]":
    """(the resolved config, that of its run, the run's tokenizer). Refuses what ranks would. Raises UserError."""
    from megapar.config import check_generate, resolve_generate
    from megapar.config.file import load_config
    from megapar.launch.machine import num_gpus

    if config.run.dir is None:
        raise ConfigError("run.dir", None, "says which run's model writes; give run.dir=RUN")
    gpus = num_gpus()
    config = resolve_generate(config, num_gpus=gpus, world_size=world_size)
    folder = Path(str(config.run.dir))
    trained = load_config(folder)
    if config.checkpoint.load is not None and not Path(config.checkpoint.load).is_dir():
        raise ConfigError("checkpoint.load", config.checkpoint.load, "no such folder; leave it out for the run's last")
    check_generate(config, trained, num_gpus=gpus, world_size=world_size)
    from megapar.checkpoint import find_checkpoint, read_manifest  # torch: only when nothing cheaper refuses

    read_manifest(find_checkpoint(config.checkpoint.load or folder))
    from megapar.generate.text import run_tokenizer

    return config, trained, run_tokenizer(folder, trained)


def writing_job(config: W, trained: TrainConfig, call: Call, entry: str, log: str, **more: Any) -> "Job":
    """The job for the ranks. entry: the command's own; log: of its name's ranks; more: other facts of the job"""
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
        log_name=f"{log}-rank",
        env=rank_environment(config.kernels.backend),
        **more,
    )
