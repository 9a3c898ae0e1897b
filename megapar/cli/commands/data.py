"""`megapar data`: make token files from text, or check existing ones."""

from dataclasses import dataclass

from megapar.cli.command import Call, Command
from megapar.config.errors import ConfigError
from megapar.config.keys import group, option
from megapar.config.schema import DataConfig


@dataclass(frozen=True)
class PrepareConfig:
    """`megapar data`: make token files from text, or check existing ones."""

    data: DataConfig = group(DataConfig, "the data")
    out: str | None = option(
        None,
        "PREFIX of the .bin/.idx/.json files and the tokenizer to write; default: in the cache",
        verbatim=True,
        path=True,
        identity=False,
    )


def run(config: PrepareConfig, call: Call) -> int:
    """Make or check token files and print what they hold. Returns the exit code."""
    from megapar.cli.output import say
    from megapar.data.prepare import check as check_data
    from megapar.data.prepare import prepare

    if config.data.source != "tokens":
        raise ConfigError("data.source", config.data.source, "this command makes token files alone; leave it out")
    prepared = prepare(config.data, prefix=config.out, log=say)
    check_data(prepared.prefix, config.data.verify)
    vocabulary = "unknown" if prepared.vocab_size is None else f"{prepared.vocab_size:,}"
    rows = [
        ("files", f"{prepared.prefix}.bin, .idx, .json"),
        ("tokenizer", str(prepared.tokenizer_path or "none")),
        ("vocabulary", vocabulary),
        ("largest token", f"{prepared.max_token:,}"),
        ("tokens", f"{prepared.tokens:,}"),
        ("documents", f"{prepared.documents:,}"),
        ("checked", "every byte" if config.data.verify == "full" else "sizes, index and samples"),
    ]
    for name, value in rows:
        print(f"{name:<14} {value}")
    return 0


COMMAND = Command(
    name="data",
    config=PrepareConfig,
    run=run,
    order=5,
    about="make token files from text, or check existing ones",
    examples=[
        ("megapar data", "tokenize Python's standard library"),
        ("megapar data data.path=FOLDER data.vocab_size=4096 out=tokens/mine", "your own text"),
        ("megapar data data.path=PREFIX data.verify=full", "re-hash existing token files"),
    ],
    most_used=["data.path", "data.tokenizer", "data.vocab_size", "data.split", "data.verify", "out"],
)
