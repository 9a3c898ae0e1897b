"""Log-likelihoods, scores of classes and greedy texts from a rank's part of a trained model, forwards alone."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import gcd

import numpy as np
import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.run_schema import SampleConfig
from megapar.config.stacks import media
from megapar.data.media.batches import LaidOut, Rows, lay_out
from megapar.data.media.samples import MediaSample
from megapar.data.tokenizer import Tokenizer
from megapar.generate.text import completion
from megapar.generate.tokens import Generator, refuse_broken
from megapar.parallel.collectives import all_reduce
from megapar.parallel.cross_entropy import vocab_parallel_argmax, vocab_parallel_cross_entropy
from megapar.part import ModelPart
from megapar.pipeline.executor import Executor
from megapar.pipeline.stage import Batch, Tensors
from megapar.schedule.lower import forward_only, lower
from megapar.tasks.sampled import IGNORED, packed

AT_ONCE = 32  # batches of one walk through the pipeline

Head = Callable[[Tensors, Batch], Tensor]


@dataclass(frozen=True)
class Span:
    """Tokens of which those from number `first`, at least 1, on are predicted, each from all before it."""

    tokens: Sequence[int]
    first: int

    @property
    def predicted(self) -> int:
        return len(self.tokens) - self.first


class Scorer:
    """A rank's part of a trained model that scores. Every method is collective, and returns the same on all ranks.

    Batches are dealt out over dp. Rows are padded on the right, where no token that counts looks; what a batch is made
    of changes a figure by no more than the rounding of another order of sums.
    """

    def __init__(self, part: ModelPart, batch_size: int) -> None:
        self.part, self.mesh, self.context = part, part.mesh, part.context
        self.batch_size = batch_size
        self.executor = Executor(part.stages, part.mesh, part.context.weight_grads)
        last = part.stages.get(part.schedule.stages - 1)
        self._first_id = getattr(getattr(last, "head", None), "first_id", 0)

    def log_likelihoods(self, spans: Sequence[Span]) -> np.ndarray:
        """fp64 [n, 2]: of every span the sum of its tokens' log-likelihoods in nats, each given those before it, and
        how many of the tokens were the likeliest. Raises UserError on all ranks for what is not finite."""
        found = self._over_batches(
            [len(span.tokens) - 1 for span in spans], 2, lambda n: self._rows(spans, n), self._sums
        )
        if not np.isfinite(found).all():
            raise UserError("the model's log-likelihoods are not finite: training diverged; use an earlier checkpoint")
        return found

    def scores(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """fp64 [n, C]: of a classifier, the score of every class of every text."""
        classes = self.part.config.model.classes
        assert classes is not None
        head: Head = lambda outputs, batch: outputs["scores"].double()  # noqa: E731
        return self._over_batches([len(text) for text in texts], classes, lambda n: self._texts(texts, n), head)

    def scores_of_media(self, samples: Sequence[MediaSample]) -> np.ndarray:
        """The same of samples of images, sound and text."""
        model = self.part.config.model
        assert model.classes is not None
        laid = [lay_out(model, sample, sample.text) for sample in samples]
        head: Head = lambda outputs, batch: outputs["scores"].double()  # noqa: E731
        batch_of: Callable[[np.ndarray], Batch] = lambda n: self._laid([laid[number] for number in n])  # noqa: E731
        return self._over_batches([len(one) for one in laid], model.classes, batch_of, head)

    def greedy(
        self,
        prompts: Sequence[Sequence[int] | MediaSample],
        most: Sequence[int],
        tokenizer: Tokenizer,
        ends: Sequence[Collection[int]] = (),
    ) -> list[tuple[str, bool]]:
        """(what the model writes after each prompt, the likeliest token each time; whether it ended the text).

        most: tokens of each at most, the end of text counted; ends: of each, see `Text`; none by default
        """
        generator = Generator.of(
            self.part.config,
            self.part.stages,
            self.context,
            texts=self.batch_size,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text,
        )
        texts = [
            generator.text(prompt, SampleConfig(max_tokens=limit, temperature=0.0), end)
            for prompt, limit, end in zip(prompts, most, ends or [()] * len(prompts), strict=True)
        ]
        for text in generator.write(texts):
            refuse_broken(text)
        return [(completion(tokenizer, text), text.ended == "stop") for text in texts]

    def _over_batches(
        self, lengths: Sequence[int], columns: int, batch_of: Callable[[np.ndarray], Batch], head: Head
    ) -> np.ndarray:
        """fp64 [n, columns]: what head(outputs, batch) [B, columns] gives, row by row. batch_of: of rows' numbers"""
        order = np.argsort([-length for length in lengths], kind="stable")  # rows of a batch are about as long
        batches = [order[first : first + self.batch_size] for first in range(0, len(order), self.batch_size)]
        own = batches[self.mesh.samples.index :: self.mesh.samples.size]
        found = torch.zeros(len(order), columns, dtype=torch.float64, device=self.mesh.device)
        for first in range(0, len(own), AT_ONCE):
            group = own[first : first + AT_ONCE]
            outputs = self._run([batch_of(numbers) for numbers in group], head)
            if self.mesh.first_along("weights", None):  # its peers have the same
                for numbers, rows in zip(group, outputs, strict=bool(outputs)):
                    found[torch.from_numpy(numbers).to(found.device)] = rows[: len(numbers)]
        self.mesh.timeline.forget()
        return all_reduce(found, self.mesh["world"]).cpu().numpy()  # one rank has a row, the others 0

    def _run(self, batches: list[Batch], head: Head) -> list[Tensor]:
        placement = self.context.placement
        schedule = lower(forward_only(placement, len(batches)), len(placement), len(batches))
        return self.executor.run(schedule, batches, head)

    def _sums(self, outputs: Tensors, batch: Batch) -> Tensor:
        """[B, 2] of a batch, see `log_likelihoods`."""
        logits, labels = outputs["logits"], batch["labels"].reshape(-1)
        best = vocab_parallel_argmax(logits, self._first_id, self.context.tp)
        losses = vocab_parallel_cross_entropy(logits, labels, self._first_id, self.context.tp, ignored=IGNORED)
        both = torch.stack([-losses.double(), (best == labels).double()], 1)
        return both.view(*batch["labels"].shape, 2).sum(1)

    def _rows(self, spans: Sequence[Span], numbers: np.ndarray) -> Batch:
        """The inputs of spans, what is to be predicted, and padding behind them."""
        length = max(len(spans[number].tokens) for number in numbers) - 1
        ids = np.zeros((self._padded(len(numbers), length), length), dtype=np.int64)
        labels = np.full_like(ids, IGNORED)
        for row, number in enumerate(numbers):
            tokens, first = np.asarray(spans[number].tokens), spans[number].first
            ids[row, : len(tokens) - 1] = tokens[:-1]
            labels[row, first - 1 : len(tokens) - 1] = tokens[first:]
        return self._batch({"ids": ids, "labels": labels})

    def _texts(self, texts: Sequence[Sequence[int]], numbers: np.ndarray) -> Batch:
        """Whole texts; padding is a sequence of its own, as an encoder looks to both sides."""
        return self._batch(self._aligned([np.asarray(texts[number]) for number in numbers]))

    def _laid(self, samples: Sequence[LaidOut]) -> Batch:
        """The same of samples with images and sounds."""
        rows = Rows(self.part.config.model, media(self.part.config.model), self._share)
        arrays = self._aligned([one.ids for one in samples])
        for name, found in (
            ("kinds", [one.kinds for one in samples]),
            ("media", [rows.add(number, one) for number, one in enumerate(samples)]),
        ):
            arrays[name] = np.zeros_like(arrays["ids"])
            for into, one in zip(arrays[name], found, strict=False):
                into[: len(one)] = one
        return self._batch(arrays | rows.arrays())

    def _aligned(self, texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """ids with padding behind them, `lengths`, and where both begin."""
        length = max(map(len, texts))
        ids = np.zeros((self._padded(len(texts), length), length), dtype=np.int64)
        lengths = np.ones(len(ids), dtype=np.int64)
        for row, text in enumerate(texts):
            lengths[row] = len(text)
            ids[row, : len(text)] = text
        begins = [np.array([0, *([end] if end < length else [])]) for end in lengths.tolist()]
        places = {name: array[0] for name, array in packed([begins], length).items()}
        return {"ids": ids, "lengths": lengths} | places

    def _padded(self, rows: int, length: int) -> int:
        """Rows of a batch with those that fill it up, where tp splits its tokens: longer ones may have no position."""
        step = self._share // gcd(self._share, length)
        return -(-rows // step) * step

    @property
    def _share(self) -> int:
        """What tokens are divided by between the tensor-parallel regions."""
        return self.context.tp.size if self.context.splits_tokens else 1

    def _batch(self, arrays: dict[str, np.ndarray]) -> Batch:
        tensors = {name: torch.from_numpy(array).to(self.mesh.device) for name, array in arrays.items()}
        samples = torch.zeros(len(arrays["ids"]), dtype=torch.int64, device=self.mesh.device)
        return tensors | {"samples": samples, "step": torch.tensor(0)}
