"""Text made by a seed."""

import random

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "tensor",
    "pipeline",
    "gradient",
    "bucket",
    "while",
    "return",
    "def",
    "naïve",
    "中文",
]


def make_text(seed: int, words: int = 400) -> str:
    """Reproducible text with lines, indentation and digits."""
    rng = random.Random(seed)
    lines = []
    for number in range(words // 8):
        lines.append(" " * (4 * (number % 3)) + " ".join(rng.choices(WORDS, k=8)) + f" = {rng.randrange(1000)}")
    return "\n".join(lines) + "\n"
