"""`megapar export`: a run's weights as a folder that transformers loads."""

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.run_schema import ExportConfig


def run(config: ExportConfig, call: Call) -> int:
    """Write the folder. Returns the exit code."""
    for key, value in (("run.dir", config.run.dir), ("hf", config.hf)):
        if value is None:
            raise ConfigError(key, None, "megapar export reads the run of run.dir=RUN and makes the folder hf=DIR")
    from megapar.cli.finish import refuse_missing_base
    from megapar.cli.output import say
    from megapar.config.file import load_trained
    from megapar.convert import export_run

    if not config.adapters:
        refuse_missing_base(load_trained(config))
    export_run(config, say)
    return 0


COMMAND = Command(
    name="export",
    config=ExportConfig,
    run=run,
    order=7,
    positional="run.dir",
    about="write a run's weights as a Hugging Face folder",
    examples=[
        ("megapar export run.dir=runs/llama hf=tuned", "the newest checkpoint, written in whatever layout"),
        ("megapar export run.dir=runs/demo hf=demo dtype=bf16", "a model of one's own, under a family's names"),
    ],
    most_used=["run.dir", "hf", "dtype", "shard_gb", "adapters", "checkpoint.load", "family"],
)
