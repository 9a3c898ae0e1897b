"""The strings of a program in thirty languages: to learn from as text, or each with its language as its label.

Django ships its user interface translated, as gettext catalogs (BSD licence; the wheel is 8 MB). `data.path=strings` is
text files of them to pre-train on, `data.path=labels` the records to classify. Both leave the same messages for
validation, in all languages: no translation of a held-out message is seen in training.
"""

import gettext
import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig, TrainConfig
from megapar.data.prepare import cache_folder, made_once
from megapar.data.records import prepare_records
from megapar.data.source import Prepared, Samples, Source, Split
from megapar.data.sources.labelled import KIND, Labelled
from megapar.data.sources.tokens import SOURCE as TOKENS
from megapar.data.split import held_out, text_hash

_NAMES = "ar bg ca cs da de el es et fi fr hu id it ja lt lv nb nl pl pt ro ru sk sl sr sv tr uk vi"
LANGUAGES = frozenset(_NAMES.split())  # with neighbours that are easily taken for each other
LEAST = 15  # characters of a string
HELD_OUT = 0.18  # of the messages
CHUNK = 20  # strings of a text file
STRINGS, LABELS = "strings", "labels"


@dataclass(frozen=True)
class Translated:
    """A string. message: what it translates; held_out: so are all translations of that."""

    text: str
    language: str
    message: str
    held_out: bool


@cache
def translations() -> list[Translated]:
    """The strings, by language and message. Raises ConfigError where Django is not installed."""
    found = importlib.util.find_spec("django")
    if found is None or found.origin is None:
        problem = (
            "reads the translations of the package django, which is not installed; pip install 'megapar[experiments]'"
        )
        raise ConfigError("data.source", "classify_language", problem)
    strings: dict[tuple[str, str], str] = {}
    for path in sorted(Path(found.origin).parent.glob("**/locale/*/LC_MESSAGES/django.mo")):
        language = path.parts[-3]
        if language in LANGUAGES:
            with open(path, "rb") as file:
                catalog = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
            for key, text in catalog.items():
                message = key[0] if isinstance(key, tuple) else key
                if message and len(text) >= LEAST and text != message:
                    strings[language, message] = text
    messages = sorted({message for _, message in strings})
    out = held_out(np.array([text_hash(message) for message in messages], dtype=np.uint64), HELD_OUT)
    aside = {message for message, there in zip(messages, out, strict=True) if there}
    return [Translated(text, *where, where[1] in aside) for where, text in sorted(strings.items())]


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    """Files of the strings in the cache, then as `tokens` and `labelled` make theirs. Raises UserError."""
    if config.path not in (STRINGS, LABELS):
        problem = f"classify_language has {STRINGS}, to pre-train on, and {LABELS}, to classify; use one of them"
        raise ConfigError("data.path", config.path, problem)
    folder = unpacked(cache_folder(config))
    if config.path == STRINGS:
        return TOKENS.prepare(replace(config, path=str(folder / "text")), say)
    files = {"path": str(folder / "train.jsonl"), "valid": str(folder / "valid.jsonl")}
    return prepare_records(KIND, replace(config, **files), say)  # type: ignore[arg-type]


def unpacked(parent: Path) -> Path:
    """The folder of the files, in `parent`, named after what is in them; made whole or not at all."""
    digest = hashlib.sha256(repr(translations()).encode()).hexdigest()
    return made_once(parent / f"classify_language-{digest[:16]}", write)


def write(folder: Path) -> None:
    """Write train.jsonl and valid.jsonl, and in text/ what is not held out."""
    strings = translations()
    for name, chosen in (("train", False), ("valid", True)):
        lines = [
            json.dumps({"text": one.text, "label": one.language, "group": one.message}, ensure_ascii=False)
            for one in strings
            if one.held_out == chosen
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "text").mkdir()
    for language in sorted(LANGUAGES):
        texts = [one.text for one in strings if one.language == language and not one.held_out]
        for number in range(0, len(texts), CHUNK):
            path = folder / "text" / f"{language}-{number // CHUNK:03}.txt"
            path.write_text("\n".join(texts[number : number + CHUNK]) + "\n", encoding="utf-8")


def open_samples(config: TrainConfig, split: Split) -> Samples:
    return TOKENS.open(config, split) if config.data.path == STRINGS else Labelled(config, split)


SOURCE = Source("classify_language", "strings of thirty languages, as text or with labels", prepare, open_samples)
