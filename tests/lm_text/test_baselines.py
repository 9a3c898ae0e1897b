"""What the model is compared with: n-grams by hand, by their definition, and as a distribution; compressors."""

import random
import zlib
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from experiments.lm_text.baselines import (
    CODE_POINTS,
    COMPRESSORS,
    PRIMED,
    compressed_bits,
    ngram_bits,
    ngram_probabilities,
    primed_bits,
)


def test_by_hand() -> None:
    """a twice and b once: n1 = n2 = 1, so a count of 1 loses 1 - 2/3 = 1/3 and one of 2 all of its 2 (n3 = 0).

    That is (1/3 + 2) / 3 = 7/9 for four characters to share: 7/36 each, and b has (1 - 1/3) / 3 = 8/36 of its own.
    """
    [found] = ngram_probabilities("aab", "abxx", 1, characters=4)
    assert found == pytest.approx([7 / 36, 15 / 36, 7 / 36, 7 / 36], rel=1e-12)


def test_a_longer_context_by_hand() -> None:
    """Pairs of abracadabra: ab, br, ra twice; ac, ca, ad, da and the first a once. So n1 = 5, n2 = 3, n3 = 0.

    A count of 2 loses all of it, so behind b, where r came twice, P(r|b) = 0 + 2/2 P'(r). P' counts the pairs that a
    character ends: 4 of a, one each of b, r, c, d; n1 = 4, n4 = 1, the others 0. A count of 1 loses 1, and one of 4 a
    half, as n3 = 0: 4 * 1 + 1/2 of 8 for five characters to share.
    """
    *_, pairs = ngram_probabilities("abracadabra", "br", 2, characters=5)
    assert pairs[1] == pytest.approx(4.5 / 8 / 5, rel=1e-12)


def by_definition(train: str, order: int, characters: int) -> dict[tuple[str, str], Fraction]:
    """Chen and Goodman's equations for every context and character of an alphabet, in fractions: slow and plain."""
    padded = "^" * order + train  # what nobody asks for stands before the text
    ends = range(order, len(padded))
    alphabet = [*sorted(set(train)), "?"]

    def level(length: int, top: bool) -> Counter[str]:
        grams = [padded[end - length + 1 : end + 1] for end in ends]
        if top:
            return Counter(grams)
        return Counter(gram[1:] for gram in {padded[end - length : end + 1] for end in ends})

    def discount(counts: Counter[str], count: int) -> Fraction:
        n = [sum(value == k for value in counts.values()) for k in range(5)]
        k = min(count, 3)
        if n[k] == 0:
            return Fraction(1, 2)
        exact = k - (k + 1) * Fraction(n[1], max(1, n[1] + 2 * n[2])) * Fraction(n[k + 1], n[k])
        return min(max(exact, Fraction(0.05)), Fraction(k))

    def probability(context: str, character: str, top: bool) -> Fraction:
        counts = level(len(context) + 1, top)
        behind = {gram: count for gram, count in counts.items() if gram[:-1] == context}
        shorter = probability(context[1:], character, False) if context else Fraction(1, characters)
        if not behind:
            return shorter
        own = counts[context + character]
        kept = sum(discount(counts, count) for count in behind.values())
        return (own - (discount(counts, own) if own else 0) + kept * shorter) / sum(behind.values())

    contexts = {padded[end - order + 1 : end] for end in ends if "^" not in padded[end - order + 1 : end]}
    return {(context, each): probability(context, each, True) for context in contexts for each in alphabet}


@pytest.mark.parametrize("order", [1, 2, 3])
def test_by_definition(order: int) -> None:
    draw = random.Random(order)
    train = "".join(draw.choices("abcd", weights=[8, 4, 2, 1], k=60))
    for (context, character), exact in by_definition(train, order, 9).items():
        *_, found = ngram_probabilities(train, context + character, order, characters=9)
        assert found[-1] == pytest.approx(float(exact), rel=1e-12), (context, character)


@pytest.mark.parametrize("context", ["", "th", "the ", "zzz", "e t\u20ac"])
def test_probabilities_sum_to_one(context: str) -> None:
    """Behind contexts that were seen, that were not, and that are of characters that were not."""
    train = "the cat that sat on the mat, the other cat, the end. " * 3 + "then others"
    alphabet = sorted(set(train))
    every = [
        [each[-1] for each in ngram_probabilities(train, context + character, 5, characters=100)]
        for character in [*alphabet, "#"]
    ]
    known, unknown = np.array(every[:-1]), np.array(every[-1])
    assert known.sum(axis=0) + (100 - len(alphabet)) * unknown == pytest.approx(np.ones(5), rel=1e-12)
    assert (unknown > 0).all()


def test_bits_leave_the_context_out() -> None:
    train = "to be or not to be" * 4
    found = list(ngram_probabilities(train, "to be", 3))
    assert ngram_bits(train, "to", " be", 3) == pytest.approx([-np.log2(each[2:]).mean() for each in found])
    [bits] = ngram_bits(train, "", "\u20ac", 1)
    assert np.log2(CODE_POINTS) < bits < np.log2(CODE_POINTS) + 10


def test_compressors_count_bits_of_characters() -> None:
    draw = random.Random(1)
    text, other = ("".join(draw.choices("abcdefgh \u00e9", k=3000)) for _ in range(2))
    assert compressed_bits("zlib", text) == 8 * len(zlib.compress(text.encode(), 9)) / 3000
    for name in COMPRESSORS:
        assert 3 < compressed_bits(name, text) < 5  # ten kinds of characters: 3.3 bits
    for name in PRIMED:
        assert primed_bits(name, text, text) < 0.2 < 3 < primed_bits(name, other, text)
