"""Tiny shards of media, and what is read of them."""

import io
import string
import tarfile
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megapar.config.schema import DataConfig
from megapar.data.source import Prepared, find_source
from megapar.data.sources.media import Media
from megapar.data.tokenizer.train import train_bpe
from tests.tiny import tiny_config

WORDS = "red green blue cat dog house what is this in it a thing"
VOCABULARY = 330


def png(number: int = 0, height: int = 16, width: int = 32, mode: str = "RGB") -> bytes:
    """An image of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).convert(mode))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    image.save(data := io.BytesIO(), kind)
    return data.getvalue()


def wav(samples: np.ndarray, width: int = 2, rate: int = 16000) -> bytes:
    """Integers [n, channels] as PCM of `width` bytes; one byte is unsigned."""
    unsigned = samples + 128 if width == 1 else samples
    raw = unsigned.astype("<i4").view(np.uint8).reshape(-1, 4)[:, :width].tobytes()
    with wave.open(data := io.BytesIO(), "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(raw)
    return data.getvalue()


def beep(number: int = 0, count: int = 50, **facts: int) -> bytes:
    return wav(np.random.default_rng(number).integers(-(2**15), 2**15, (count, 1)), **facts)


def samples(count: int = 12) -> dict[str, bytes]:
    """Files by name: every sample has an image, a sound, a text, a target and a class; some of them two images."""
    files: dict[str, bytes] = {}
    for number in range(count):
        files[f"s{number:03}.0.png"] = png(number)
        if number % 3 == 0:
            files[f"s{number:03}.1.png"] = png(100 + number, 32, 16)
        files[f"s{number:03}.cls"] = f"{'cat' if number % 2 else 'dog'}\n".encode()
        files[f"s{number:03}.target.txt"] = f"a thing {number}".encode()
        files[f"s{number:03}.txt"] = f"what is <image> in {number}".encode()
        files[f"s{number:03}.wav"] = beep(number, 40 + number)
    return files


def write_shard(path: Path, files: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_loose(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def prepared(folder: Path, path: object, say: Callable[[str], Any] = lambda line: None, **data: Any) -> Prepared:
    """Media prepared with a cache in `folder`, and a tokenizer of bytes, letters and a few words."""
    if not (tokenizer := folder / "tokenizer.model").exists():
        train_bpe([f"{WORDS} {string.ascii_letters}{string.digits}<>"] * 4, VOCABULARY, tokenizer)
    values: dict[str, Any] = {"cache": str(folder / "cache"), "tokenizer": str(tokenizer), "split": 0.0} | data
    return find_source("media").prepare(DataConfig(source="media", path=str(path), **values), say)


def opened(found: Prepared, split: Any = "train", **keys: Any) -> Media:
    reads = {"model.image.layers": 1, "model.audio.layers": 1, "train.seq_length": 1000}
    values = reads | {"data.source": "media", "model.vocab_size": found.vocab_size} | keys
    samples = find_source("media").open(tiny_config(found.prefix, **values), split)
    assert isinstance(samples, Media)
    return samples
