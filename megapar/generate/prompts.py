"""Prompts from a file: one a line, as text or as JSON objects."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.config.run_schema import GenerateConfig
from megapar.config.schema import ModelConfig, TrainConfig
from megapar.data.jsonl import decoded, read_lines
from megapar.data.media.decode import Undecodable, clip_of, image_of
from megapar.data.media.samples import MediaSample, first_mark, marked
from megapar.data.tokenizer import Tokenizer
from megapar.generate.text import prompt_tokens

JSON_LINES = ".jsonl"


@dataclass(frozen=True)
class Prompt:
    """text: as the file has it; where: the file and the line's number"""

    text: str
    where: str


def read_prompts(path: str) -> list[Prompt]:
    """Every line of a file that is not empty; of a .jsonl file the `prompt` of every line's object.

    Raises UserError for a file that can't be read or has no prompt, with the line's number for a line that is none.
    """
    if path.endswith(JSON_LINES):
        lines = read_lines(Path(path), "prompt_file")
        return [Prompt(line.text("prompt"), f"{line.path}:{line.number}") for line in lines]
    try:
        read = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError("prompt_file", path, f"can't be read ({error.strerror}); name another file") from None
    texts = [(decoded(path, number, line), number) for number, line in enumerate(read.split(b"\n"), 1)]
    prompts = [Prompt(line.removesuffix("\r"), f"{path}:{number}") for line, number in texts if line.strip()]
    if not prompts:
        raise ConfigError("prompt_file", path, "holds no prompt; write one a line")
    return prompts


def prompts_of(
    config: GenerateConfig, tokenizer: Tokenizer, trained: TrainConfig
) -> tuple[list[Prompt], list[list[int]]]:
    """The prompts of a command, and the token ids of each.

    Raises UserError for what can't be read, and for a prompt that is too long. A single one for a decoder never is: of
    that the end is seen.
    """
    whole = config.prompt_file is None
    prompts = [Prompt(config.prompt, "prompt")] if config.prompt_file is None else read_prompts(config.prompt_file)
    tokens = [prompt_tokens(tokenizer, prompt.text, config.chat) for prompt in prompts]
    reads = trained.model.encoder.layers > 0
    most, remedy = most_tokens(trained), "" if reads or whole else ", or give it as prompt="
    hold = f"the model's context holds train.seq_length={trained.train.seq_length}"
    if reads:
        hold = f"its encoder reads train.source_length={trained.train.source_length}, the end of text counted"
    for prompt, found in zip(prompts, tokens, strict=True):
        if trained.model.has_media and (mark := first_mark(prompt.text)):
            raise UserError(f"{prompt.where}: {mark} is for one prompt; give it as prompt=, with image= or audio=")
        if len(found) > most and (reads or not whole):
            raise UserError(f"{prompt.where}: {len(found)} tokens, {hold}; shorten the prompt{remedy}")
    return prompts, tokens


def has_media(config: GenerateConfig, model: ModelConfig) -> bool:
    """Whether a prompt has images or sounds, or names some."""
    named = config.prompt_file is None and first_mark(config.prompt)
    return bool(config.image or config.audio or (model.has_media and named))


def media_prompt(config: GenerateConfig, tokenizer: Tokenizer, model: ModelConfig) -> MediaSample:
    """The prompt of a command with its images and sounds. Raises UserError for what can't be read."""
    images = tuple(_read(path, image_of, model) for path in config.image or [])
    clips = tuple(_read(path, clip_of, model) for path in config.audio or [])
    try:
        pieces = marked(config.prompt, len(images), len(clips))
    except ValueError as error:
        raise ConfigError("prompt", config.prompt, str(error)) from None
    tokens = [tokenizer.encode(piece) if isinstance(piece, str) else [piece] for piece in pieces]
    text = np.array([token for some in tokens for token in some], dtype=np.int64)
    return MediaSample(images, clips, text, np.zeros(0, dtype=np.int64), -1)


def _read(path: str, decode: Callable[[bytes, ModelConfig], np.ndarray], model: ModelConfig) -> np.ndarray:
    try:
        return decode(Path(path).read_bytes(), model)
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); name another file") from None
    except (Undecodable, ValueError) as error:
        raise UserError(f"{path}: {error}; name another file") from None


def most_tokens(trained: TrainConfig) -> int:
    """Tokens that a prompt of a run's model has at most: an encoder reads the end of text behind it."""
    if not trained.model.encoder.layers:
        return trained.train.seq_length
    assert trained.train.source_length is not None
    return trained.train.source_length - 1
