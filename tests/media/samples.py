"""Tiny samples of images, sound and text, and models that read them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data import shards
from tests.data.shards import encoded, wav, write_shard

CLASSES = ["cat", "dog", "fox"]
RATE = 1000  # Hz

# An image is 1 to 6 patches of 2 x 2 grey values, a sound 2 to 4 tokens of two frames each.
MODEL: dict[str, Any] = {
    "model.layers": 2,
    "model.image.layers": 2,
    "model.image.hidden": 24,
    "model.image.heads": 6,
    "model.image.ffn": 36,
    "model.image.patch": 2,
    "model.image.channels": 1,
    "model.audio.layers": 1,
    "model.audio.hidden": 12,
    "model.audio.heads": 6,
    "model.audio.ffn": 24,
    "model.audio.rate": RATE,
    "model.audio.window_ms": 16.0,
    "model.audio.hop_ms": 8.0,
    "model.audio.mels": 5,
    "model.audio.frames": 2,
    "model.init_std": 0.2,
    "train.seq_length": 36,
    "parallel.check_gradients": False,  # a micro-batch without a medium does not use its encoder
}
CLASSIFIES: dict[str, Any] = MODEL | {
    "task.name": "multimodal_classify",
    "model.output": "classes",
    "model.classes": len(CLASSES),
    "model.causal": False,
    "model.pooling": "mean",
}
WRITES: dict[str, Any] = MODEL | {"task.name": "multimodal_lm"}


def sample(number: int) -> dict[str, bytes]:
    """Files of a sample. One in three has text alone; others have up to two images and two sounds."""
    chosen = np.random.default_rng(number)
    files = {
        "cls": CLASSES[number % 3].encode(),
        "target.txt": f"{number % 7} it".encode(),
        "txt": f"a {number}".encode(),
    }
    if number % 3 == 0:
        return files
    images, sounds = int(chosen.integers(1, 3)), int(chosen.integers(0, 3))
    for at in range(images):
        height, width = 2 * chosen.integers(1, 4, size=2)
        files[f"{at}.png"] = encoded(Image.fromarray(chosen.integers(0, 256, (height, width), dtype=np.uint8)))
    for at in range(sounds):
        values = chosen.integers(-(2**14), 2**14, (int(chosen.integers(20, 60)), 1))
        files[f"{at}.wav"] = wav(values, rate=RATE)
    if sounds:
        files["txt"] = f"a <audio> {number}".encode()
    return files


def prepared(folder: Path, samples: Sequence[dict[str, bytes]] | None = None) -> dict[str, Any]:
    """Keys of a run on a shard of samples, by default of 60 of those above."""
    given = [sample(number) for number in range(60)] if samples is None else samples
    files = {f"s{number:03}.{name}": data for number, one in enumerate(given) for name, data in one.items()}
    path = write_shard(folder / "samples.tar", files)
    found = shards.prepared(folder, path)
    return {
        "data.source": "media",
        "data.path": str(path),
        "data.prefix": found.prefix,
        "model.vocab_size": found.vocab_size,
    }
