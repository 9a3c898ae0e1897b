"""`megapar generate`: one rank of a model that writes."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO, TypeVar

from megapar.checkpoint import Manifest
from megapar.config.check import with_layout
from megapar.config.derive import for_device
from megapar.config.errors import ConfigError, UserError
from megapar.config.file import load_trained
from megapar.config.keys import changed
from megapar.config.run_schema import ForwardConfig, GenerateConfig, WriterConfig
from megapar.config.schema import TrainConfig
from megapar.console import console
from megapar.data.media.samples import MediaSample
from megapar.data.tokenizer import Tokenizer
from megapar.generate.prompts import Prompt, has_media, media_prompt, most_tokens, prompts_of
from megapar.generate.text import TextStream, completion, run_tokenizer
from megapar.generate.tokens import Generator, generate_tokens, refuse_broken
from megapar.parallel.agreement import all_or_none, gather_texts
from megapar.part import open_part

T = TypeVar("T")


class Writer:
    """A rank of a run's model that writes, and the tokenizer of the run. Collective; raises UserError on all ranks.

    texts: most that are written at a time
    prompt_length: most tokens of a prompt
    """

    def __init__(self, config: WriterConfig, rank: int, texts: int = 1) -> None:
        assert config.run.dir is not None
        run_dir = Path(config.run.dir)
        trained = in_layout(load_trained(config), config)
        self.tokenizer = run_tokenizer(run_dir, trained)
        self.part, manifest = open_part(trained, config.checkpoint.load or run_dir, rank)
        self.prompt_length = most_tokens(trained)
        with all_or_none(self.part.mesh["world"], self.part.mesh.device):
            refuse_other_tokenizer(self.tokenizer, manifest)
            self.generator = Generator.of(
                trained,
                self.part.stages,
                self.part.context,
                texts=texts,
                vocab_size=self.tokenizer.vocab_size,
                end_of_text=self.tokenizer.end_of_text,
            )


def run_rank(config: GenerateConfig, rank: int, world_size: int) -> None:
    """Write what follows the prompts as rank `rank` of `world_size`, the default process group being up.

    Rank 0 writes prompt and continuation, of a chat the answer alone, as they come to the terminal, or to
    `config.out`. Raises UserError.
    """
    writer = Writer(config, rank, 1 if config.prompt_file is None else config.batch_size)
    part, tokenizer = writer.part, writer.tokenizer
    with all_or_none(part.mesh["world"], part.mesh.device):
        prompts, found = prompts_of(config, tokenizer, part.config)
        sample = media_prompt(config, tokenizer, part.config.model) if has_media(config, part.config.model) else None
        out = _open(config.out) if config.out is not None and rank == 0 else None
    # Of one rank: a template may write the time of day.
    found = json.loads(gather_texts(json.dumps(found), part.mesh["world"], part.mesh.device)[0])
    with out or nullcontext(console()) as file:
        if config.prompt_file is None:
            _write_one(config, writer, sample or found[0], file)
        else:
            _write_many(config, writer, prompts, found, file)
    part.close()


def _write_one(config: GenerateConfig, writer: Writer, prompt: Sequence[int] | MediaSample, file: TextIO) -> None:
    """The text as it comes."""
    before = prompt.text[prompt.text >= 0].tolist() if isinstance(prompt, MediaSample) else prompt
    stream = TextStream(writer.tokenizer, lambda text: print(text, end="", file=file, flush=True), before)
    if not config.chat and writer.generator.source_length is None:
        print(config.prompt, end="", file=file, flush=True)
    generate_tokens(writer.generator, prompt, config.sample, stream.put, _ends(config, writer))
    stream.finish()
    print(file=file, flush=True)


def _write_many(
    config: GenerateConfig, writer: Writer, prompts: Sequence[Prompt], found: Sequence[list[int]], file: TextIO
) -> None:
    """Every text when it and those before it are finished."""
    texts = [writer.generator.text(tokens, config.sample, _ends(config, writer)) for tokens in found]
    alone = config.chat or writer.generator.source_length is not None
    numbers = {id(text): number for number, text in enumerate(texts)}
    finished = ((numbers[id(text)], text) for text in writer.generator.write(texts))
    for prompt, text in zip(prompts, in_order(finished), strict=True):
        refuse_broken(text)
        new = completion(writer.tokenizer, text)
        if config.out is not None:
            line = json.dumps({"prompt": prompt.text, "completion": new}, ensure_ascii=False)
        else:
            line = f"--- {prompt.where}\n" + (new if alone else prompt.text + new)
        print(line, file=file, flush=True)


def _ends(config: GenerateConfig, writer: Writer) -> Collection[int]:
    """Tokens that end a text, beside the end of text."""
    return writer.tokenizer.answer_ends if config.chat else ()


def in_order(numbered: Iterable[tuple[int, T]]) -> Iterator[T]:
    """What has the numbers 0, 1, 2, ..., each as soon as it and all before it have come."""
    held: dict[int, T] = {}
    wanted = 0
    for number, one in numbered:
        held[number] = one
        while wanted in held:
            yield held.pop(wanted)
            wanted += 1


def in_layout(trained: TrainConfig, config: ForwardConfig) -> TrainConfig:
    """A run's config with the layout, precision and device to run in; forwards need no schedule."""
    values = {
        "parallel": config.parallel,
        "kernels": config.kernels,
        "parallel.zero": 0,
        "pipeline.schedule": "1f1b",
        "pipeline.chunks": None,
        "train.dtype": config.dtype,
        "train.device": config.device,
    }
    return with_layout(for_device(changed(trained, values)), config.parallel.layout)


def refuse_other_tokenizer(tokenizer: Tokenizer, manifest: Manifest) -> None:
    """Raise UserError where the checkpoint says that its tokens came from another tokenizer."""
    found = hashlib.sha256(tokenizer.path.read_bytes()).hexdigest()
    expected = manifest.data.get("tokenizer", found)
    if found != expected:
        hashes = f"{found:.8}..., not {expected:.8}..."
        raise UserError(f"{tokenizer.path}: not the tokenizer of this checkpoint ({hashes}); put that there")


def _open(path: str) -> TextIO:
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError("out", path, f"can't be written ({error.strerror}); name another file") from None
