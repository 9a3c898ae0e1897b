"""Text made by a seed, text that is hard for tokenizers, and what must hold of it."""

import random

import numpy as np
from hypothesis import strategies as st

from megapar.data.tokenizer import Tokenizer
from megapar.data.tokenizer.contract import SPACE_MARK

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


# Text that tokenizers treat in a way of its own, mixed with any text at all.
TRAPS = [
    SPACE_MARK,
    "\u2585",
    "<s>",
    "</s>",
    "<unk>",
    "<0x41>",
    "<0xE2>",
    "\0",
    "\r\n",
    "\t",
    "  ",
    "\n\n",
    "\ufeff",
    "🎉",
    "\u2028",
]
ANY_TEXT = st.lists(st.one_of(st.text(), st.sampled_from(TRAPS))).map("".join)


def _random_lines(alphabet: str, *, width: int = 60, lines: int = 200) -> str:
    rng = np.random.default_rng(len(alphabet))
    letters = np.array(list(alphabet))
    return "\n".join("".join(letters[rng.integers(0, len(letters), width)]) for _ in range(lines)) + "\n"


# Scripts and formats, most of them without a single space.
WITHOUT_SPACES = {
    "DNA": _random_lines("ACGT"),
    "protein": _random_lines("ACDEFGHIKLMNPQRSTVWY"),
    "Chinese": _random_lines("天地玄黃宇宙洪荒日月盈昃辰宿列張。，"),
    "Japanese": _random_lines("いろはにほへとちりぬるをカタカナ漢字、。"),
    "Thai": _random_lines("กขคงจฉชซญดตถทนบปผฝพฟมยรลวสหอ" + "ะาิีุู่้"),
    "Khmer": _random_lines("កខគឃងចឆជឈញដឋ" + "ាិីុូ្"),
    "CSV of numbers": "\n".join(f"{n},{n * n},{n / 7:.3f},-{n}" for n in range(300)),
    "base64": _random_lines("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", width=76),
    "JSON lines": "\n".join(f'{{"id":{n},"tags":["a{n % 7}","b"],"v":null}}' for n in range(300)),
    "tabs and CRLF": "".join(f"row{n}\t{n % 9}\tx\r\n" for n in range(300)),
    "URLs": "\n".join(f"https://example.org/{n % 13}/index.html?q={n}#top" for n in range(300)),
    "emoji": _random_lines("🎉🙂👩\u200d🔬🏳\ufe0f"),
    "Arabic": _random_lines("ابتثجحخدذرزسشصضطظعغفقكلمنهوي") + "مع مسافات\n",
    "Hindi": _random_lines("कखगघचछजझटठडढतथदधनपफबभमयरलवशषसह" + "ािीुूे्"),
}


def assert_nothing_lost(tokenizer: Tokenizer, text: str) -> None:
    """The text comes back, its characters are counted, and none of it became the end of the document."""
    ids, counts = tokenizer.encode(text), tokenizer.char_counts()
    assert tokenizer.decode(ids) == text
    assert counts is not None and counts[ids].sum() == len(text)
    assert tokenizer.end_of_text not in ids
