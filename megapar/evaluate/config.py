"""The keys of `megapar eval`."""

from dataclasses import dataclass
from typing import Literal

from megapar.config.keys import option
from megapar.config.run_schema import ForwardConfig


@dataclass(frozen=True)
class EvalConfig(ForwardConfig):
    """`megapar eval`: evaluate a trained model."""

    text: str | None = option(
        None, "file or folder of text: nats per token, perplexity, bits per byte", verbatim=True, path=True
    )
    choices: str | None = option(
        None,
        'JSONL file, {"prompt", "choices", "answer"} a line: is the right choice the likeliest?',
        verbatim=True,
        path=True,
    )
    match: str | None = option(
        None,
        'JSONL file, {"prompt", "response"} a line: does the model write that, greedily?',
        verbatim=True,
        path=True,
    )
    labels: str | None = option(
        None, 'JSONL file, {"text", "label"} a line: of a classifier, is it right?', verbatim=True, path=True
    )
    media: str | None = option(
        None,
        "tar shards, or a folder: of a model of images and sound, is it right, with all modalities and with parts?",
        verbatim=True,
        path=True,
    )
    on_error: Literal["refuse", "skip"] = option(
        "refuse", "media: a sample that can't be read or used is an error, or left out and counted"
    )
    stride: int | None = option(
        None,
        "text: tokens that a window predicts; those before are context; default: half of train.seq_length",
        at_least=1,
    )
    batch_size: int = option(8, "rows of one forward pass; changes no figure", at_least=1)
    out: str | None = option(
        None, "file for all figures as JSON, those of single items too", verbatim=True, path=True, identity=False
    )
