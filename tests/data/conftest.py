"""Small corpora that the data tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megapar.config.schema import DataConfig
from megapar.data.prepare import Prepared, prepare
from megapar.data.tokenizer import Tokenizer, open_tokenizer
from megapar.data.tokenizer.train import train_bpe
from tests.data.texts import make_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 40 text files."""
    root = tmp_path / "text"
    root.mkdir()
    for number in range(40):
        (root / f"{number:03}.txt").write_text(make_text(number), encoding="utf-8")
    return root


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> DataConfig:
    """That folder, with a small tokenizer and a cache of its own."""
    return DataConfig(path=str(folder), vocab_size=400, split=0.2, cache=str(tmp_path / "cache"))


@pytest.fixture
def prepared(config: DataConfig) -> Prepared:
    return prepare(config)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "bpe.model"
    texts = [make_text(seed) for seed in range(20)] + ["<s> </s> <unk> <0x41> <|endoftext|> \t x\r\n" * 200]
    train_bpe(texts, 460, path)
    return open_tokenizer(path)


@pytest.fixture
def flip() -> Callable[[str, int], None]:
    """Change one byte of a file in place, and only its last bit."""

    def flip_bit(path: str, offset: int) -> None:
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 1]))

    return flip_bit
