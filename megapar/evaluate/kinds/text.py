"""Perplexity: how well text is predicted, token by token."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megapar.config.errors import ConfigError, UserError
from megapar.data.corpus import find_text
from megapar.evaluate.kind import Evaluation, Result, Subject
from megapar.evaluate.scorer import Scorer, Span


@dataclass(frozen=True)
class Texts:
    """Files as they stand, and the token that is in front of each."""

    texts: list[str]
    before: int


def read(path: str, subject: Subject) -> Texts:
    """Every file of a folder, or one file. Raises UserError."""
    try:
        source = find_text(path)
        source.keep_text()
        texts = [file.path.read_bytes().decode("utf-8") for file in source.files]
    except ConfigError as error:
        raise UserError("text" + str(error).removeprefix(error.key)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("text", path, f"changed while it was read ({error}); run again when it is at rest") from None
    return Texts([text for text in texts if text], subject.tokenizer.end_of_text)


def measure(data: Texts, subject: Subject, scorer: Scorer) -> Result:
    """Of all files together. A file begins behind an end-of-text token, as documents do in training."""
    stride = subject.options.stride or max(1, subject.context_length // 2)
    spans: list[Span] = []
    for ids in subject.tokenizer.encode_batch(data.texts):
        spans += windows([data.before, *ids], subject.context_length, stride)
    found = scorer.log_likelihoods(spans)
    tokens = sum(span.predicted for span in spans)
    nats, hits = -float(found[:, 0].sum()), int(found[:, 1].sum())
    size, characters = sum(len(text.encode()) for text in data.texts), sum(map(len, data.texts))
    lossless = subject.tokenizer.char_counts() is not None
    loss, bits = nats / tokens, nats / math.log(2)
    figures = {
        "files": len(data.texts),
        "tokens": tokens,
        "characters": characters,
        "bytes": size,
        "stride": stride,
        "nats_per_token": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "bits_per_byte": bits / size,
        "bits_per_char": bits / characters if lossless else None,
        "token_accuracy": hits / tokens,
    }
    shown = [
        ("tokens", f"{tokens:,}"),
        ("nats per token", f"{loss:.4f}"),
        ("perplexity", f"{figures['perplexity']:,.3f}"),
        ("bits per byte", f"{figures['bits_per_byte']:.4f}"),
        *([("bits per character", f"{figures['bits_per_char']:.4f}")] if lossless else []),
        ("tokens found", f"{hits / tokens:.4f}"),
    ]
    return Result(figures, shown)


def windows(tokens: Sequence[int], length: int, stride: int) -> list[Span]:
    """Windows over tokens that predict each but the first exactly once, from at most `length` tokens before it.

    The first window predicts up to `length` tokens, those behind it `stride` each and the last what is left. All but
    the first `length` are predicted from at least length - stride + 1 tokens. Where there are so many, each window has
    `length` of input, the last one too.
    """
    assert 1 <= stride <= length
    found, done, total = [], 1, len(tokens)
    while done < total:
        stop = min(total, done + (length if done == 1 else stride))
        start = max(0, stop - 1 - length)
        found.append(Span(tokens[start:stop], done - start))
        done = stop
    return found


EVALUATION = Evaluation("text", ("lm",), read, measure)
