"""Text of any folder, or the plays that lie beside this file: token files as `tokens` makes them.

`data.path=plays` is the shipped text (TEXT.md says what it is); every other path means what it means to `tokens`.
"""

import hashlib
import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megapar.config.schema import DataConfig
from megapar.data.prepare import cache_folder, made_once
from megapar.data.source import Prepared, Source
from megapar.data.sources.tokens import SOURCE as TOKENS

PLAYS = "plays"  # as `data.path`: a word, as `stdlib` is one
ARCHIVE = Path(__file__).with_name("plays.tar.xz")


def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
    """Token files of `config`; of the plays, unpacked first. Raises UserError as `tokens`."""
    if config.path == PLAYS and config.prefix is None:
        if os.path.exists(PLAYS):
            say(
                f"data: {PLAYS} is the text that comes with lm_text; data.path=./{PLAYS} is what lies here by that name"
            )
        config = replace(config, path=str(unpack(ARCHIVE, cache_folder(config))))
    return TOKENS.prepare(config, say)


def unpack(archive: Path, parent: Path) -> Path:
    """The folder of an archive's files, in `parent`, named after the archive's content. It is made whole or not at all.

    Raises UserError where it can't be written.
    """
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()

    def fill(folder: Path) -> None:
        (folder / PLAYS).mkdir()
        with tarfile.open(archive) as files:
            for member in files:
                text = files.extractfile(member)
                assert text is not None, f"{archive}: {member.name} is no file"
                (folder / PLAYS / member.name).write_bytes(text.read())

    return made_once(parent / f"{PLAYS}-{digest[:16]}", fill) / PLAYS


SOURCE = Source("lm_text", "the plays that come with lm_text, or any text", prepare, TOKENS.open)
