"""The keys of `megapar interpret`."""

from dataclasses import dataclass

from megapar.config.keys import option
from megapar.config.run_schema import ForwardConfig


@dataclass(frozen=True)
class InterpretConfig(ForwardConfig):
    """`megapar interpret`: what a run's model does with a text, as one page."""

    prompt: str = option("", "text that is read, verbatim; of train.seq_length tokens at most", verbatim=True)
    top: int = option(5, "next tokens that are shown behind every layer", at_least=1)
    out: str | None = option(
        None,
        "HTML file to write; default: interpret.html in the run directory",
        verbatim=True,
        path=True,
        identity=False,
    )
