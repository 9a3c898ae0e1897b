"""`megapar import`: a Hugging Face folder becomes a run's directory."""

from pathlib import Path
from shlex import quote

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.run_schema import ImportConfig


def run(config: ImportConfig, call: Call) -> int:
    """Write the run directory. Returns the exit code."""
    for key, value in (("hf", config.hf), ("run.dir", config.run.dir)):
        if value is None:
            raise ConfigError(key, None, "megapar import reads the folder hf=DIR and makes the directory run.dir=RUN")
    from megapar.cli.output import say
    from megapar.convert import import_folder

    assert config.hf is not None and config.run.dir is not None
    made = import_folder(Path(config.hf), Path(config.run.dir), say)
    length = f" train.seq_length={made.train.seq_length}" if made.model.position == "learned" else ""  # rows of a table
    words = [quote(f"{key}={config.run.dir}") for key in ("model", "checkpoint.weights")]
    print(f"megapar train {' '.join(words)} data.path=TEXT{length}")
    return 0


COMMAND = Command(
    name="import",
    config=ImportConfig,
    run=run,
    order=6,
    positional="hf",
    about="make a run directory from a Hugging Face folder",
    examples=[
        ("megapar import hf=Llama-3.2-1B run.dir=runs/llama", "config, weights and tokenizer; no pickles, no code"),
        ("megapar import Llama-3.2-1B run.dir=runs/llama", "the same"),
    ],
    most_used=["hf", "run.dir"],
)
