"""`megapar interpret`: one rank of a model that is looked into."""

from pathlib import Path

import torch

from megapar.config.errors import ConfigError
from megapar.config.file import load_trained
from megapar.config.schema import TrainConfig
from megapar.console import console
from megapar.data.corpus import counted
from megapar.data.tokenizer import Tokenizer
from megapar.files import write_atomic
from megapar.generate.run import in_layout, refuse_other_tokenizer
from megapar.generate.text import prompt_tokens, run_tokenizer
from megapar.interpret.capture import Capture
from megapar.interpret.config import InterpretConfig
from megapar.interpret.lens import Lens, logit_lens
from megapar.interpret.page import Reading, page_of
from megapar.interpret.reading import read
from megapar.parallel.agreement import all_or_none
from megapar.part import ModelPart, open_part

PAGE = "interpret.html"  # in a run's directory


def tokens_of(config: InterpretConfig, tokenizer: Tokenizer, trained: TrainConfig) -> list[int]:
    """Those of the prompt. Raises UserError for a model that reads more than text, and a prompt that is too long."""
    model = trained.model
    if model.encoder.layers or model.has_media:
        what = "an encoder" if model.encoder.layers else "encoders of images or sound"
        raise ConfigError("run.dir", config.run.dir, f"its model has {what}; `interpret` reads text alone")
    if not config.prompt:
        raise ConfigError("prompt", "", "says what the model reads; give prompt=TEXT")
    found = prompt_tokens(tokenizer, config.prompt)
    if len(found) > trained.train.seq_length:
        most = f"the model's context holds train.seq_length={trained.train.seq_length}"
        raise ConfigError("prompt", config.prompt[:40], f"{len(found)} tokens, and {most}; shorten it")
    return found


def run_rank(config: InterpretConfig, rank: int, world_size: int) -> None:
    """Read the prompt as rank `rank` of `world_size`, the default process group being up. Rank 0 writes the page.

    Raises UserError.
    """
    trained = in_layout(load_trained(config), config)
    folder = Path(str(config.run.dir))
    tokenizer = run_tokenizer(folder, trained)
    part, manifest = open_part(trained, config.checkpoint.load or folder, rank)
    with all_or_none(part.mesh["world"], part.mesh.device):
        refuse_other_tokenizer(tokenizer, manifest)
        tokens = tokens_of(config, tokenizer, trained)
    reading = reading_of(part, tokenizer, tokens, config.top, f"{folder.resolve().name}, step {manifest.step}")
    if rank == 0:
        out = Path(config.out) if config.out is not None else folder / PAGE
        write_atomic(out, page_of(reading))
        print(f"{counted(len(tokens), 'token')}, {config.parallel.layout}: {out}", file=console(), flush=True)
    part.close()


def reading_of(part: ModelPart, tokenizer: Tokenizer, tokens: list[int], top: int, title: str) -> Reading:
    """What a model makes of tokens in one pass. Collective; the same on every rank."""
    model = part.config.model
    layers = [f"layers.{index}" for index in range(model.layers)]
    rows = ["embedding", *layers] if model.has_logits else []
    maps = [f"{name}.attention.weights" for name in layers]
    with Capture(part, [*rows, *maps]) as seen:
        read(part, torch.tensor([tokens]))
    weights = torch.stack([seen[name][0] for name in maps]).transpose(1, 2)
    lens = logit_lens(part, [seen[name] for name in rows], top) if rows else None
    layout, dtype = part.config.parallel.layout, part.config.train.dtype
    return Reading(
        title=title,
        facts=f"{len(tokens)} tokens; {model.layers} layers of {model.heads} heads; read as {layout} in {dtype}",
        tokens=[_shown(tokenizer, token) for token in tokens],
        rows=rows,
        said=_said(lens, tokenizer) if lens is not None else [],
        chances=lens.probabilities[:, 0] if lens is not None else torch.zeros(0),
        entropy=lens.entropy[:, 0] if lens is not None else torch.zeros(0),
        weights=weights.double().cpu(),
    )


def _said(lens: Lens, tokenizer: Tokenizer) -> list[list[list[str]]]:
    return [[[_shown(tokenizer, token) for token in cell] for cell in row[0]] for row in lens.tokens.tolist()]


def _shown(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that stands for none by its number."""
    if token >= tokenizer.vocab_size:
        return f"<{token}>"
    piece = tokenizer.piece(token)
    if piece is None:
        return tokenizer.decode([token])
    return piece.decode(errors="backslashreplace") if piece else f"<{token}>"
