"""Prompts from a file: one a line, as text or as JSON objects."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megapar.config.errors import ConfigError, UserError
from megapar.data.jsonl import decoded, read_lines
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


def tokens_of(tokenizer: Tokenizer, prompts: Iterable[Prompt], chat: bool, context_length: int) -> list[list[int]]:
    """Token ids of each. Raises UserError, with file and line, for one that the context does not hold."""
    found = []
    for prompt in prompts:
        tokens = prompt_tokens(tokenizer, prompt.text, chat)
        if len(tokens) > context_length:
            hold = f"the model's context holds train.seq_length={context_length}"
            raise UserError(f"{prompt.where}: {len(tokens)} tokens, {hold}; shorten the prompt, or give it as prompt=")
        found.append(tokens)
    return found
