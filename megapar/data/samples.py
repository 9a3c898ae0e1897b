"""Samples of token files: windows over the documents of one split."""

from collections.abc import Iterable
from functools import cached_property
from typing import Literal

import numpy as np

from megapar.config.errors import ConfigError, UserError
from megapar.data.indexed import IndexedTokens
from megapar.data.manifest import read_manifest, tokenizer_named
from megapar.data.order import SampleOrder
from megapar.data.split import held_out, load_hashes, token_hashes
from megapar.data.tokenizer import open_tokenizer


class SampleSet:
    """The samples of one split of a corpus.

    The split's documents lie end to end in the order of the file; sample w of an epoch is the window of
    `seq_length + 1` tokens from w * seq_length on (the last token of a window is the first of the next: it is only
    predicted there). A window may span documents; an end-of-text token marks where. "train" shuffles every epoch
    anew, "valid" keeps the order of the file. What is left at the end, less than a window, is not used.

    num_samples    samples of one epoch
    num_tokens     tokens of the split
    num_documents  documents of the split

    prefix: token files, with or without what `prepare` leaves beside them. holdout: `data.split`.
    Raises UserError where the files are faulty, or the split has not tokens enough for one sample.
    """

    def __init__(
        self, prefix: str, *, split: Literal["train", "valid"], seq_length: int, seed: int, holdout: float
    ) -> None:
        if split not in ("train", "valid"):
            raise ValueError(f"split must be train or valid, got {split!r}")
        if seq_length < 1:
            raise ConfigError("train.seq_length", seq_length, "must be at least 1")
        self.prefix, self.split, self.seq_length = str(prefix), split, seq_length
        corpus = IndexedTokens(prefix)
        self._tokens, self._offsets = corpus.tokens, corpus.document_offsets
        mask = self._mask = self._documents_of_split(corpus, holdout)
        self.num_documents = int(mask.sum())
        self._ends, self._shift = _runs(corpus.document_offsets, mask)
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        self.num_samples = max(0, (self.num_tokens - 1) // seq_length)
        if self.num_samples == 0:
            raise self._too_few(corpus, holdout)
        self.order = SampleOrder(self.num_samples, seed, shuffle=split == "train")

    def sample(self, index: int) -> np.ndarray:
        """Sample `index`, counted from 0 over all epochs: int64 [seq_length + 1]."""
        out = np.empty(self.seq_length + 1, dtype=np.int64)
        self._read(self.window(index) * self.seq_length, out)
        return out

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        """The samples of `indices`, each counted from 0 over all epochs: int64 [number of indices, seq_length + 1]."""
        numbers = [int(index) for index in indices]
        out = np.empty((len(numbers), self.seq_length + 1), dtype=np.int64)
        for row, index in zip(out, numbers, strict=True):
            self._read(self.window(index) * self.seq_length, row)
        return out

    def begins(self, index: int) -> np.ndarray:
        """Where in the first `seq_length` tokens of a sample documents begin, int64: 0 first, as if one did there."""
        first = self.window(index) * self.seq_length
        low, high = self._begins.searchsorted([first + 1, first + self.seq_length])
        return np.append(0, self._begins[low:high] - first)

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where the split's documents begin in its tokens, int64 [documents]; of empty ones once for each."""
        lengths = np.diff(self._offsets)[self._mask]
        return np.cumsum(lengths) - lengths

    def window(self, index: int) -> int:
        """Which window, 0..num_samples-1, sample `index` is."""
        return self.order.item(index)

    @cached_property
    def char_counts(self) -> np.ndarray | None:
        """Characters that each token stands for, int32 [vocab]; None where the corpus came without a tokenizer, or its
        tokenizer changes text.

        A file beside the corpus that the manifest does not name is no tokenizer of it.
        """
        manifest = read_manifest(self.prefix)
        path = None if manifest is None else tokenizer_named(self.prefix, manifest)
        return None if path is None else open_tokenizer(path).char_counts()

    def _documents_of_split(self, corpus: IndexedTokens, holdout: float) -> np.ndarray:
        hashes = load_hashes(self.prefix, corpus.num_documents)
        if hashes is None:
            hashes = token_hashes(corpus.tokens, corpus.document_offsets)
        mask = held_out(hashes, holdout)
        return mask if self.split == "valid" else ~mask

    def _read(self, begin: int, out: np.ndarray) -> None:
        """Fill `out` with the split's tokens from `begin` on, run by run."""
        run = int(self._ends.searchsorted(begin, side="right"))
        filled = 0
        while filled < len(out):
            place = begin + filled
            take = min(len(out) - filled, int(self._ends[run]) - place)
            source = place + int(self._shift[run])
            out[filled : filled + take] = self._tokens[source : source + take]
            filled += take
            run += 1

    def _too_few(self, corpus: IndexedTokens, holdout: float) -> UserError:
        need = self.seq_length + 1
        if self.split == "valid" and holdout == 0:
            return ConfigError(
                "data.split", holdout, "nothing is held out; set data.split above 0 or train.eval_every=0"
            )
        if self.split == "valid" and self.num_documents == 0:
            return ConfigError(
                "data.split",
                holdout,
                f"{self.prefix} has {corpus.num_documents} document(s), no two different: none can be held out; "
                "give more documents or set train.eval_every=0",
            )
        return ConfigError(
            "train.seq_length",
            self.seq_length,
            f"a sample needs {need} tokens, the {self.split} split of {self.prefix} has {self.num_tokens} "
            f"in {self.num_documents} document(s); "
            f"lower train.seq_length, change data.split={holdout} or give more text",
        )


def _runs(document_offsets: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents of a split, neighbours in the file joined to runs.

    Returns int64 [runs] each: where the run ends in the split's tokens, and what to add to a place in the split's
    tokens to find it in the file.
    """
    begins, ends = document_offsets[:-1][mask], document_offsets[1:][mask]
    filled = ends > begins
    begins, ends = begins[filled], ends[filled]
    if len(begins) == 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    opens = np.append(True, begins[1:] != ends[:-1])  # not the neighbour of the document before
    run_begins, run_ends = begins[opens], ends[np.append(opens[1:], True)]
    split_ends = np.cumsum(run_ends - run_begins)
    return split_ends, run_ends - split_ends
