"""What a text costs without a neural network: character n-grams, and the compressors that every Python carries.

All in bits per character. The n-gram learns from training text alone, as the model does; compressors learn from what
they have read, too.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator

import numpy as np

CODE_POINTS = 0x110000  # characters that a text may have: those that training text lacks share what is left for them
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}
# bz2 is not among them: it sorts blocks of 900,000 bytes, so what a text adds says where a block happened to end.
PRIMED = ("zlib", "xz")


def ngram_bits(train: str, context: str, text: str, orders: int) -> list[float]:
    """Bits per character of `text`, which stands behind `context`, by n-grams of order 1..orders."""
    found = ngram_probabilities(train, context + text, orders)
    return [float(-np.log2(each[len(context) :]).mean()) for each in found]


def ngram_probabilities(train: str, text: str, orders: int, characters: int = CODE_POINTS) -> Iterator[np.ndarray]:
    """The probability of each character of `text` behind those before it, fp64 [len(text)], by order 1, 2, ..., orders.

    Interpolated Kneser-Ney with three discounts (Chen and Goodman, An Empirical Study of Smoothing Techniques for
    Language Modeling, 1998, section 3). Below the shortest context all `characters` are equally likely. Contexts that
    reach in front of the text were never seen, so shorter ones decide.
    """
    runs = _Runs(train, text, orders)
    shorter = np.full(len(text), 1 / characters)
    for order in range(1, orders + 1):
        runs.lengthen()
        yield runs.interpolate(runs.in_train, shorter)
        if order < orders:
            shorter = runs.interpolate(runs.once_by_predecessor(), shorter)


class _Runs:
    """The runs of n characters that end at each place of training text and text, by number; n grows.

    in_train: int64 [len(train)], the places of the training text
    """

    def __init__(self, train: str, text: str, orders: int) -> None:
        gap = np.full(orders + 1, -1)  # no context reaches from one text into the other
        places = np.concatenate([gap, _codes(train), gap, _codes(text)])
        _, self._codes = np.unique(places, return_inverse=True)
        self._kinds = int(self._codes.max()) + 1
        self.in_train = len(gap) + np.arange(len(train))
        self._in_text = len(places) - len(text) + np.arange(len(text))
        self._runs = self._contexts = np.zeros(len(places), dtype=np.int64)

    def lengthen(self) -> None:
        """To runs that are a character longer, whose contexts are the runs before."""
        self._contexts, self._runs = self._longer()

    def _longer(self) -> tuple[np.ndarray, np.ndarray]:
        contexts = np.concatenate([[0], self._runs[:-1]])
        return contexts, np.unique(contexts * self._kinds + self._codes, return_inverse=True)[1]

    def once_by_predecessor(self) -> np.ndarray:
        """Places of the training text, one for each pair of a run and the character before it."""
        _, longer = self._longer()
        return self.in_train[np.unique(longer[self.in_train], return_index=True)[1]]

    def interpolate(self, counted: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """Probabilities of the text's characters: of counts at `counted`, less discounts that `shorter` shares out."""
        runs, contexts = self._runs, self._contexts
        counts = np.bincount(runs[counted], minlength=runs.max() + 1)
        discount = _discounts(counts)[np.minimum(counts, 3)]
        _, first = np.unique(runs[counted], return_index=True)
        seen, size = counted[first], contexts.max() + 1
        total = np.bincount(contexts[counted], minlength=size)[contexts[self._in_text]]
        kept = np.bincount(contexts[seen], weights=discount[runs[seen]], minlength=size)[contexts[self._in_text]]
        own = (counts - discount)[runs[self._in_text]]
        return np.where(total > 0, (own + kept * shorter) / np.maximum(total, 1), shorter)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from a count of 0, 1, 2 and 3 or more: fp64 [4]. A half where no run has that count."""
    n1, n2, n3, n4 = (int((counts == count).sum()) for count in (1, 2, 3, 4))
    share = n1 / max(1, n1 + 2 * n2)
    found = [0.0]
    for count, here, above in ((1, n1, n2), (2, n2, n3), (3, n3, n4)):
        exact = count - (count + 1) * share * above / here if here else 0.5
        found.append(min(max(exact, 0.05), count))  # with nothing taken, what was never seen would be impossible
    return np.array(found)


def _codes(text: str) -> np.ndarray:
    """Code points, int64 [len(text)]."""
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4").astype(np.int64)


def compressed_bits(name: str, text: str) -> float:
    """Bits per character of a text that is compressed alone. name: of COMPRESSORS"""
    return 8 * len(COMPRESSORS[name](text.encode())) / len(text)


def primed_bits(name: str, train: str, text: str) -> float:
    """Bits per character that a text adds to the compressed training text when it stands behind it."""
    compress = COMPRESSORS[name]
    return 8 * (len(compress((train + text).encode())) - len(compress(train.encode()))) / len(text)
