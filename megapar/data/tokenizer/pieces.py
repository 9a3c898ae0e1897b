"""Which bytes each token of a `tokenizer.json` stands for, where that can be said for every text."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megapar.data.tokenizer.contract import SPACE_MARK

BYTE = re.compile("<0x([0-9A-F]{2})>")
SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}


def token_bytes(spec: Mapping[str, Any], vocabulary: Mapping[str, int], control: set[int]) -> list[bytes] | None:
    """UTF-8 bytes by id, empty for control tokens and unused ids; None where text may be changed on its way in.

    Known are byte-level models (a character for each byte) and such with byte fallback (<0xE2>, a mark for a space),
    whose steps in front of the model only cut text. The caller tries texts on the result, with every added token, which
    may take spaces along.

    spec: the whole file. vocabulary: id by token, added tokens included.
    """
    model = spec["model"]
    steps = [*_flat(spec.get("normalizer"), "normalizers"), *_flat(spec.get("pre_tokenizer"), "pretokenizers")]
    byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return None
    if not (byte_level or model.get("byte_fallback")) or not all(_only_cuts(step, byte_level) for step in steps):
        return None
    found = [b""] * (max(vocabulary.values()) + 1)
    single = set()
    for content, token in vocabulary.items():
        if token in control:
            continue
        if not byte_level and (byte := BYTE.fullmatch(content)):
            found[token] = bytes.fromhex(byte[1])
            single.add(found[token])
            continue
        found[token] = _bytes_of(content) if byte_level else content.replace(SPACE_MARK, " ").encode()
        if byte_level and len(found[token]) == 1:
            single.add(found[token])
    return found if len(single) == 256 else None


def _flat(step: Mapping[str, Any] | None, below: str) -> Iterator[Mapping[str, Any]]:
    """A step of the way in, or the steps of a Sequence."""
    if step is None:
        return
    if step.get("type") == "Sequence":
        for one in step.get(below, []):
            yield from _flat(one, below)
    else:
        yield step


def _only_cuts(step: Mapping[str, Any], byte_level: bool) -> bool:
    """Whether a step changes no text but by the two spellings that tokens are read back from."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return not step.get("add_prefix_space", False)
    if kind in ("Split", "Punctuation"):
        return step.get("behavior") != "Removed"
    if kind == "Metaspace":
        first = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
        return not byte_level and first == "never" and step.get("replacement") == SPACE_MARK
    return kind == "Digits" or (not byte_level and {**step} == SPACE_TO_MARK)


def _byte_of_character() -> dict[str, int]:
    """The characters that GPT-2 wrote bytes as: printable ones stand for themselves, the others are moved up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of(content: str) -> bytes:
    """Of a token of a byte-level model; an added token with other characters is its own text."""
    try:
        return bytes([BYTE_OF_CHARACTER[character] for character in content])
    except KeyError:
        return content.encode()
