"""Language by counts of character n-grams: multinomial naive Bayes (Manning et al. 2008, chapter 13)."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np


def ngrams(text: str, longest: int) -> Iterator[str]:
    """The n-grams of 1 to `longest` characters of a text, a space on either side of it."""
    padded = f" {text} "
    for length in range(1, longest + 1):
        yield from (padded[at : at + length] for at in range(len(padded) - length + 1))


def naive_bayes(
    texts: Sequence[str], labels: Sequence[str], held_out: Sequence[str], longest: int = 3, smoothing: float = 0.1
) -> list[str]:
    """The likeliest label of every held-out text. Labels count as equally likely beforehand, n-grams that training
    lacks are left out, and `smoothing` is added to every count."""
    names = sorted(set(labels))
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for text, label in zip(texts, labels, strict=True):
        counts[label].update(ngrams(text, longest))
    vocabulary = {gram: number for number, gram in enumerate(sorted(set().union(*counts.values())))}
    table = np.full((len(vocabulary), len(names)), smoothing)
    for column, name in enumerate(names):
        for gram, count in counts[name].items():
            table[vocabulary[gram], column] += count
    scores = np.log(table / table.sum(0))
    found = []
    for text in held_out:
        rows = [vocabulary[gram] for gram in ngrams(text, longest) if gram in vocabulary]
        found.append(names[int(scores[rows].sum(0).argmax())])
    return found


def accuracy(found: Sequence[str], labels: Sequence[str]) -> float:
    return float(np.mean([one == other for one, other in zip(found, labels, strict=True)]))
