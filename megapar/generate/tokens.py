"""Texts that a model writes token by token, in any layout, several at a time."""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megapar.config.errors import UserError
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import ModelConfig, TrainConfig
from megapar.config.stacks import media
from megapar.data.media.batches import LaidOut, Rows, lay_out
from megapar.data.media.samples import MediaSample
from megapar.generate.choose import choose
from megapar.parallel.cache import KVCache
from megapar.parallel.collectives import all_gather
from megapar.parallel.context import StageContext
from megapar.pipeline.executor import Executor
from megapar.pipeline.stage import Batch, Stage, Tensors, TensorSpec
from megapar.schedule.actions import Schedule
from megapar.schedule.lower import forward_only, lower

_NOT_FINITE = -1  # sent instead of a token


@dataclass(eq=False)
class Text:
    """A text that is being written.

    tokens: the prompt's, at least one, and those written, without the end of text
    sample: how its tokens are chosen, and how many at most
    prompt: tokens of the prompt
    logprobs: the natural logarithm of the model's probability of every token that was chosen, the end of text
        included: before temperature, top-k and top-p
    tempered: they are behind the temperature, of what is drawn from (without top-k and top-p)
    ends: tokens that end it as the end of text does
    source: tokens that an encoder reads, if the model has one
    laid: the prompt with its images and sounds, if it has any
    ended: stop: by the end of text or one of `ends`; length: it has `sample.max_tokens`; broken: its logits were not
        finite
    """

    tokens: list[int]
    sample: SampleConfig
    prompt: int = -1
    ends: Collection[int] = ()
    source: Sequence[int] = ()
    laid: LaidOut | None = None
    tempered: bool = False
    logprobs: list[float] = field(default_factory=list)
    ended: Literal["stop", "length", "broken"] | None = None
    # Where its keys and values are: those of `cached` tokens from number `start` on, in a slot of the generator's.
    slot: int | None = None
    start: int = 0
    cached: int = 0

    def __post_init__(self) -> None:
        assert self.tokens, "nothing to continue"
        self.tokens = [int(token) for token in self.tokens]
        self.prompt = len(self.tokens) if self.prompt < 0 else self.prompt

    @property
    def written(self) -> list[int]:
        return self.tokens[self.prompt :]

    def goes_on(self, tokens: Sequence[int], sample: SampleConfig) -> None:
        """Make `tokens` the prompt of what is to be written next. What is cached of the same beginning is kept."""
        same = next((n for n, (a, b) in enumerate(zip(self.tokens, tokens, strict=False)) if a != b), None)
        same = min(len(self.tokens), len(tokens)) if same is None else same
        self.cached = max(0, min(self.cached, same - self.start))
        self.tokens, self.sample, self.prompt = list(tokens), sample, len(tokens)
        self.logprobs, self.ended = [], None


def window_start(length: int, context_length: int) -> int:
    """The first token that the next one sees, of a text of `length` tokens.

    When the context is full it moves on by a quarter of it, rounded up, and what is left is computed anew, with
    positions that begin at 0 again: a token sees between 3/4 of the context and all of it.
    """
    step = -(-context_length // 4)
    return max(0, -(-(length - context_length) // step)) * step


class Generator:
    """Writes texts with a rank's part of a model, which may be one that trains.

    stages, context: of the part, whose last stage gives logits
    context_length: positions that the model was trained on; of longer texts it sees the end, see `window_start`
    source_length, start: of a model with an encoder, the most tokens that this reads, and what a text begins with
    model: of one that reads images or sound
    texts: most that are written at a time; the cache has room for so many
    vocab_size: of the tokenizer; the model may have more rows, which are never chosen
    end_of_text: the token that ends a text

    Every rank of a replica calls the same with the same arguments. Weights may change between texts, not within one.
    prefilled: tokens that went through the model so far. Raises UserError for a stage that keeps no cache.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        context: StageContext,
        *,
        context_length: int,
        source_length: int | None = None,
        start: int = 0,
        model: ModelConfig | None = None,
        texts: int = 1,
        vocab_size: int | None = None,
        end_of_text: int | None = None,
    ) -> None:
        self.context, self.mesh = context, context.mesh
        self.context_length, self.vocab_size, self.end_of_text = context_length, vocab_size, end_of_text
        self.source_length, self.start, self.model = source_length, start, model
        source = None if source_length is None else KVCache(texts, source_length)
        self.cache = KVCache(texts, context_length, source)
        cached = {number: _Cached(stage, self.cache) for number, stage in stages.items()}
        self.prefilled = 0
        self._executor = Executor(cached, self.mesh, context.weight_grads)
        self._schedules: dict[int, Schedule] = {}
        self._widths: list[int] | None = None
        self._free = list(range(texts))[::-1]

    @classmethod
    def of(cls, config: TrainConfig, stages: Mapping[int, Stage], context: StageContext, **options: Any) -> "Generator":
        """Of a resolved config's model. options: `texts`, `vocab_size`, `end_of_text`."""
        encoder = config.model.encoder
        length, source = config.train.seq_length, config.train.source_length if encoder.layers else None
        model = config.model if config.model.has_media else None
        facts: dict[str, Any] = {"source_length": source, "start": encoder.start, "model": model}
        return cls(stages, context, context_length=length, **facts, **options)

    def text(self, prompt: Sequence[int] | MediaSample, sample: SampleConfig, ends: Collection[int] = ()) -> Text:
        """A text to be written behind a prompt; with an encoder, which reads the prompt and the end of text, from a
        target's start on. Behind images and sounds no more is written than the context holds with them. Raises
        UserError for a prompt that does not fit."""
        if isinstance(prompt, MediaSample):
            assert self.model is not None
            laid = lay_out(self.model, prompt, prompt.text)
            if len(laid) > self.context_length:
                hold = f"the model's context holds train.seq_length={self.context_length}"
                raise UserError(f"{len(laid)} tokens with those of images and sounds, and {hold}; give less")
            most = min(sample.max_tokens, self.context_length - len(laid) + 1)
            return Text(laid.ids.tolist(), replace(sample, max_tokens=most), ends=ends, laid=laid)
        if self.source_length is None:
            return Text(list(prompt), sample, ends=ends)
        source = [*prompt, *([] if self.end_of_text is None else [self.end_of_text])]
        if len(source) > self.source_length:
            hold = f"the encoder reads train.source_length={self.source_length}"
            raise UserError(f"{len(source)} tokens with the end of text, and {hold}; shorten the prompt")
        return Text([self.start], sample, ends=ends, source=source)

    def step(self, texts: Sequence[Text]) -> None:
        """Write one token more of each of these texts, which have not ended. Collective over the replica.

        A text that was not here before takes a free slot, which `leave` gives back. The draw for a position depends on
        (sample.seed, position) alone, so neither layout nor company changes it but where rounding moves a probability
        across it.
        """
        assert texts and not any(text.ended for text in texts)
        for text in texts:
            if text.slot is None:
                text.slot, text.start, text.cached = self._free.pop(), 0, 0
        texts = sorted(texts, key=lambda text: text.slot or 0)  # slots beside each other are read where they lie
        pieces = min(len(texts), max(self.context.placement) + 1)  # so that stages work at the same time
        cuts = [len(texts) * piece // pieces for piece in range(pieces + 1)]
        batches = [self._batch(texts[a:b]) for a, b in pairwise(cuts)]
        with self.context.whole_tokens():
            logits = self._executor.run(self._schedule(pieces), batches, _logits)
        self.mesh.timeline.forget()
        for text, (token, logprob) in zip(texts, self._chosen(logits, texts), strict=True):
            self._end_or_append(text, int(token), logprob)

    def leave(self, text: Text) -> None:
        """Give back the slot of a text."""
        if text.slot is not None:
            if text.ended == "broken":
                self.cache.clear(text.slot)
            self._free.append(text.slot)
            text.slot = None

    def write(
        self,
        texts: Iterable[Text],
        on_token: Callable[[Text, int], None] = lambda text, token: None,
    ) -> Iterator[Text]:
        """Write texts to their ends, and yield each where it ended. As one ends, the next begins in its place.

        on_token: called with each token as soon as it is chosen
        """
        waiting = iter(texts)
        current: list[Text] = []
        while True:
            while len(current) < self.cache.texts and (text := next(waiting, None)) is not None:
                current.append(text)
            if not current:
                return
            before = [len(text.tokens) for text in current]
            self.step(current)
            for text, length in zip(current, before, strict=True):
                if len(text.tokens) > length:
                    on_token(text, text.tokens[-1])
            for text in [text for text in current if text.ended]:
                self.leave(text)
                current.remove(text)
                yield text

    def _end_or_append(self, text: Text, token: int, logprob: float) -> None:
        if token == _NOT_FINITE:
            text.ended = "broken"
            return
        text.logprobs.append(logprob)
        if token == self.end_of_text or token in text.ends:
            text.ended = "stop"
            return
        text.tokens.append(token)
        if len(text.tokens) - text.prompt >= text.sample.max_tokens:
            text.ended = "length"

    def _schedule(self, pieces: int) -> Schedule:
        if pieces not in self._schedules:
            placement = self.context.placement
            self._schedules[pieces] = lower(forward_only(placement, pieces), len(placement), pieces)
        return self._schedules[pieces]

    def _batch(self, texts: Sequence[Text]) -> Batch:
        """What is not cached of these texts; from now on it is."""
        ids: list[int] = []
        positions: list[int] = []
        counts = []
        reads = [text.cached == 0 and text.start == 0 for text in texts]
        for text in texts:
            start = window_start(len(text.tokens), self.context_length)
            if start != text.start:
                text.start, text.cached = start, 0
            first = min(text.cached, len(text.tokens) - start - 1)
            text.cached = len(text.tokens) - start
            ids += text.tokens[start + first :]
            positions += range(first, text.cached)
            counts.append(text.cached - first)
        self.prefilled += len(ids)
        device = self.context.device
        return (
            self._sources(texts, reads)
            | self._media(texts, reads, counts)
            | {
                "ids": torch.tensor([ids], device=device),
                "positions": torch.tensor([positions], device=device),
                "samples": torch.zeros(1, dtype=torch.int64, device=device),
                "step": torch.tensor(0),
                "slots": torch.tensor([text.slot for text in texts]),
                "counts": torch.tensor(counts),
                "lengths": torch.tensor([text.cached for text in texts]),
            }
        )

    def _sources(self, texts: Sequence[Text], reads: Sequence[bool]) -> Batch:
        """What an encoder reads for those of the texts that are new."""
        if self.source_length is None:
            return {}
        new = [text.source for text, first in zip(texts, reads, strict=True) if first]
        positions = [place for source in new for place in range(len(source))]
        device = self.context.device
        return {
            "source": torch.tensor([[token for source in new for token in source]], dtype=torch.int64, device=device),
            "source_positions": torch.tensor([positions], dtype=torch.int64, device=device),
            "source_starts": torch.tensor([0, *accumulate(map(len, new))], dtype=torch.int32, device=device),
            "source_longest": torch.tensor(max(map(len, new), default=0)),
            "source_lengths": torch.tensor([len(text.source) for text in texts]),
            "source_new": torch.tensor(reads),
        }

    def _media(self, texts: Sequence[Text], reads: Sequence[bool], counts: Sequence[int]) -> Batch:
        """The images and sounds of those of the texts that are new."""
        if self.model is None:
            return {}
        rows, tokens = Rows(self.model, media(self.model)), sum(counts)
        kinds, which = np.zeros((1, tokens), dtype=np.int64), np.zeros((1, tokens), dtype=np.int64)
        for text, new, end, count in zip(texts, reads, accumulate(counts), counts, strict=True):
            if new and text.laid is not None:
                place = slice(end - count, end - count + len(text.laid))
                kinds[0, place], which[0, place] = text.laid.kinds, rows.add(0, text.laid)
        arrays = rows.arrays() | {"kinds": kinds, "media": which}
        return {name: torch.from_numpy(array).to(self.context.device) for name, array in arrays.items()}

    def _chosen(self, logits: list[Tensor], texts: Sequence[Text]) -> list[list[float]]:
        """(token, log-probability) of each text, on every rank; chosen on one of the last stage's."""
        pp, tp, last = self.mesh["pp"], self.mesh["tp"], self.context.placement[-1]
        chosen = torch.zeros(len(texts), 2, dtype=torch.float64, device=self.context.device)
        if pp.index == last:
            whole = self._whole_vocabulary(logits[0] if len(logits) == 1 else torch.cat(logits))
            if tp.index == 0:
                chosen = self._choose(whole[:, : self.vocab_size], texts)
            if tp.size > 1:
                dist.broadcast(chosen, tp.ranks[0], group=tp.group)
        if pp.size > 1:
            dist.broadcast(chosen, pp.ranks[last], group=pp.group)
        return chosen.tolist()

    def _choose(self, logits: Tensor, texts: Sequence[Text]) -> Tensor:
        """logits [n, V] -> [n, 2] in fp64, which holds every id."""
        tokens, finite = logits.argmax(1), torch.isfinite(logits).all(1)
        drawn = [row for row, text in enumerate(texts) if text.sample.temperature and finite[row]]
        for row in drawn:
            tokens[row] = choose(logits[row].cpu().numpy(), texts[row].sample, len(texts[row].tokens))
        if any(text.tempered for text in texts):
            scales = [text.sample.temperature if text.tempered else 1.0 for text in texts]
            logits = logits / logits.new_tensor(scales).unsqueeze(1)
        logprobs = logits.gather(1, tokens.unsqueeze(1)) - torch.logsumexp(logits, 1, keepdim=True)
        tokens.masked_fill_(~finite, _NOT_FINITE)
        return torch.cat([tokens.unsqueeze(1).double(), logprobs.double()], 1)

    def _whole_vocabulary(self, logits: Tensor) -> Tensor:
        """[n, V_r], this rank's part of the vocabulary, -> [n, V], at least fp32. Shards differ by a row: padded."""
        tp, logits = self.context.tp, logits.to(self.context.wide_dtype)
        if tp.size == 1:
            return logits
        if self._widths is None:
            self._widths = all_gather(torch.tensor([logits.shape[1]], device=logits.device), tp).tolist()
        padded = nn.functional.pad(logits, (0, max(self._widths) - logits.shape[1]))
        parts = all_gather(padded.unsqueeze(0), tp)
        return torch.cat([part[:, :width] for part, width in zip(parts, self._widths, strict=True)], 1)


class _Cached:
    """A stage for the executor, with its cache."""

    def __init__(self, stage: Any, cache: KVCache) -> None:
        if "cache" not in inspect.signature(stage.forward).parameters:
            kind = type(stage).__name__
            raise UserError(
                f"model.module: the stage {kind} can't write: its forward takes no cache, as a Transformer's"
            )
        self.stage, self.cache = stage, cache

    def __call__(self, received: Tensors, batch: Batch) -> Tensors:
        outputs: Tensors = self.stage(received, batch, self.cache)
        return outputs

    def received(self, batch: Batch) -> Mapping[str, TensorSpec]:
        found: Mapping[str, TensorSpec] = self.stage.received(batch)
        return found

    def sent(self, batch: Batch) -> Mapping[str, TensorSpec]:
        found: Mapping[str, TensorSpec] = self.stage.sent(batch)
        return found

    def train(self, mode: bool = True) -> Any:
        if self.stage.training != mode:  # to walk all modules costs as much as to write half a token
            self.stage.train(mode)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self.stage.named_modules())


def _logits(outputs: Tensors, batch: Batch) -> Tensor:
    return outputs["logits"]


def generate_tokens(
    generator: Generator,
    prompt: Sequence[int] | MediaSample,
    sample: SampleConfig,
    on_token: Callable[[int], None] = lambda token: None,
    ends: Collection[int] = (),
) -> list[int]:
    """The tokens that the model writes after `prompt`, up to `sample.max_tokens` or the end of text, which is left out.

    ends: tokens that end it as the end of text does
    on_token: called with each token as soon as it is chosen, on every rank

    Collective over the replica's ranks, which all return the same. Raises UserError on all of them for logits that are
    not finite.
    """
    [text] = generator.write([generator.text(prompt, sample, ends)], lambda text, token: on_token(token))
    refuse_broken(text)
    return text.written


def refuse_broken(text: Text) -> None:
    """Raise UserError for a text whose logits were not finite."""
    if text.ended == "broken":
        line = f"the model's logits for token {len(text.tokens)} are not finite"
        raise UserError(f"{line}: training diverged; use an earlier checkpoint")
