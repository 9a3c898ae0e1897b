"""Which files a tokenizer is, and where they lie: in a folder of their own, in a run directory, or beside token files.

In a folder they have the names that Hugging Face gives them; beside token files each name stands behind `PREFIX.`
(`PREFIX.tokenizer.json`), and a SentencePiece model is `PREFIX.model`.
"""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError
from megapar.data.tokenizer.contract import LIBRARIES, Tokenizer, refused
from megapar.files import special

MODEL, JSON = "tokenizer.model", "tokenizer.json"
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")  # a tokenizer.json's, if there
NAMES = (JSON, MODEL, *BESIDE)
ENDINGS = {JSON: ".tokenizer.json", MODEL: ".model"} | {name: f".{name}" for name in BESIDE}  # of PREFIX


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a file (`.json`: Hugging Face's, else a SentencePiece model) or of a folder with one.

    Raises ConfigError for `data.tokenizer`, also where the library for its kind is not installed.
    """
    file = find_tokenizer(path)
    if not _is_json(file):
        from megapar.data.tokenizer.spm import SentencePieceTokenizer

        return SentencePieceTokenizer(file)
    try:
        import tokenizers  # noqa: F401
    except ImportError:
        raise refused(file, f"the library tokenizers, which reads it, {LIBRARIES}") from None
    from megapar.data.tokenizer.hf import JsonTokenizer

    return JsonTokenizer(file)


def find_tokenizer(path: str | Path) -> Path:
    """The file that a path names, a folder's tokenizer.json or else tokenizer.model. Raises ConfigError."""
    place = Path(path).expanduser()
    if not place.is_dir():
        return place
    if (file := tokenizer_in(place)) is None:
        raise refused(place, f"this folder has no {JSON} and no {MODEL}; name a folder or a file that is a tokenizer")
    return file


def tokenizer_in(folder: Path) -> Path | None:
    """The tokenizer's file in a folder, such as a run directory; None where there is none."""
    return next((folder / name for name in (JSON, MODEL) if (folder / name).is_file()), None)


def tokenizer_beside(prefix: str | Path | None) -> Path | None:
    """The tokenizer's file beside token files, whether or not their manifest names it; None where there is none."""
    if prefix is None:
        return None
    files = [Path(f"{prefix}{ENDINGS[name]}") for name in (MODEL, JSON)]
    return next((file for file in files if file.is_file()), None)


def files_of(path: Path) -> dict[str, Path]:
    """The files of a tokenizer that are there, the main one first, by their names in a folder."""
    if not _is_json(path):
        return {MODEL: path}
    before = path.name.removesuffix(JSON) if path.name.endswith(JSON) else ""
    beside = {name: path.with_name(before + name) for name in BESIDE}
    return {JSON: path} | {name: file for name, file in beside.items() if file.is_file()}


def identity(path: Path) -> dict[str, Any]:
    """Hashes of a tokenizer's files: sha256 of the main one, and of those beside it by name, if there are any.

    Raises ConfigError where one can't be read.
    """
    try:
        if kind := special(path):
            raise refused(path, f"is a {kind}; write the tokenizer to a file")
        hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files_of(path).items()}
    except OSError as error:
        problem = f"must be bpe or the path of a SentencePiece .model, a {JSON} or their folder ({error.strerror})"
        raise ConfigError("data.tokenizer", path, problem) from None
    main, *beside = hashes
    return {"sha256": hashes[main]} | ({"beside": {name: hashes[name] for name in beside}} if beside else {})


def copy_beside(path: Path, prefix: str | Path) -> None:
    """Copy a tokenizer's files to beside token files."""
    for name, file in files_of(path).items():
        shutil.copyfile(file, f"{prefix}{ENDINGS[name]}")


def copy_into(path: Path, folder: Path) -> None:
    """Copy a tokenizer's files into a folder."""
    for name, file in files_of(path).items():
        shutil.copyfile(file, folder / name)


def _is_json(path: Path) -> bool:
    return path.suffix == ".json"
