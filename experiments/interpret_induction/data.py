"""Random tokens whose end is there twice: nothing but what stood behind an earlier copy says what comes next."""

from collections.abc import Callable, Iterable

import numpy as np

from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.order import SampleOrder
from megapar.data.source import Prepared, Source, Split

VOCABULARY = 64
SAMPLES = {"train": 1 << 20, "valid": 4096}


class Repeated:
    """Samples of seq_length + 1 tokens."""

    def __init__(self, config: TrainConfig, split: Split) -> None:
        self.length, self.split = config.train.seq_length + 1, split
        self.num_samples = SAMPLES[split]
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices: Iterable[int]) -> np.ndarray:
        return np.stack([repeated(self.split, self.order.item(int(index)), self.length)[0] for index in indices])


def repeated(split: Split, number: int, length: int) -> tuple[np.ndarray, int]:
    """(tokens of a sample, int64 [length]; how many of them, the last ones, repeat as many in front of these).

    A quarter to a half repeats, so that the earlier copy is nowhere by its position. Training and held-out samples are
    drawn apart from each other.
    """
    draw = np.random.default_rng([split == "valid", number])
    count = int(draw.integers(length // 4, length // 2 + 1))
    tokens = draw.integers(VOCABULARY, size=length)
    tokens[length - count :] = tokens[length - 2 * count : length - count]
    return tokens, count


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    return Prepared("", vocab_size=VOCABULARY, max_token=VOCABULARY - 1)


SOURCE = Source("interpret_induction", "random tokens whose end is there twice", prepare, Repeated)
