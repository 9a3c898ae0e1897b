"""`megapar generate`: one rank of a model that writes."""

import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

from megapar.checkpoint import Manifest
from megapar.config.check import with_layout
from megapar.config.derive import for_device
from megapar.config.errors import ConfigError, UserError
from megapar.config.file import load_config
from megapar.config.keys import changed
from megapar.config.schema import ForwardConfig, GenerateConfig, TrainConfig
from megapar.console import console
from megapar.data.tokenizer import Tokenizer
from megapar.generate.text import TextStream, prompt_tokens, run_tokenizer
from megapar.generate.tokens import generate_tokens
from megapar.parallel.agreement import all_or_none, gather_texts
from megapar.part import open_part
from megapar.pipeline.executor import Executor


def run_rank(config: GenerateConfig, rank: int, world_size: int) -> None:
    """Write the continuation of `config.prompt` as rank `rank` of `world_size`, the default process group being up.

    Rank 0 writes prompt and continuation, of a chat the answer alone, as they come to the terminal, or to
    `config.out`. Raises UserError.
    """
    assert config.run.dir is not None
    run_dir = Path(config.run.dir)
    trained = in_layout(load_config(run_dir), config)
    tokenizer = run_tokenizer(run_dir, trained)
    part, manifest = open_part(trained, config.checkpoint.load or run_dir, rank)
    executor = Executor(part.stages, part.mesh, part.context.weight_grads)
    with all_or_none(part.mesh["world"], part.mesh.device):
        refuse_other_tokenizer(tokenizer, manifest)
        end_of_text = tokenizer.end_of_text
        prompt = prompt_tokens(tokenizer, config.prompt, config.chat) if rank == 0 else []
        out = _open(config.out) if config.out is not None and rank == 0 else None
    # Of one rank: a template may write the time of day.
    prompt = json.loads(gather_texts(json.dumps(prompt), part.mesh["world"], part.mesh.device)[0])
    with out or nullcontext(console()) as file:
        stream = TextStream(tokenizer, lambda text: print(text, end="", file=file, flush=True), prompt)
        if not config.chat:
            print(config.prompt, end="", file=file, flush=True)
        generate_tokens(
            executor,
            part.context,
            prompt,
            config.sample,
            context_length=trained.train.seq_length,
            vocab_size=tokenizer.vocab_size,
            end_of_text=end_of_text,
            on_token=stream.put,
        )
        stream.finish()
        print(file=file, flush=True)
    part.close()


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
