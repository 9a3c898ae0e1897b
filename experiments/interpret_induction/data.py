"""Random tokens, and the same again: nothing but what stood behind an earlier copy says what comes next."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.order import SampleOrder
from megapar.data.source import Prepared, Source, Split

VOCABULARY = 64
SAMPLES = {"train": 1 << 20, "valid": 4096}


class Repeated:
    """Samples of S + 1 tokens: the first half drawn at random, which the second half repeats; S is odd."""

    def __init__(self, config: TrainConfig, split: Split) -> None:
        self.length, self.split = config.train.seq_length + 1, split
        self.num_samples = SAMPLES[split]
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        return np.stack([repeated(self.split, self.order.item(int(index)), self.length) for index in indices])


def repeated(split: Split, number: int, length: int) -> np.ndarray:
    """Tokens of a sample, int64 [length]. Training and held-out samples are drawn apart from each other."""
    half = np.random.default_rng([split == "valid", number]).integers(VOCABULARY, size=-(-length // 2))
    return np.concatenate([half, half])[:length]


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return Prepared("", vocab_size=VOCABULARY, max_token=VOCABULARY - 1)


SOURCE = Source("interpret_induction", "random tokens, and the same again", prepare, Repeated)
