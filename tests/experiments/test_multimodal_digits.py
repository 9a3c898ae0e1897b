"""The experiment's data and baselines."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.multimodal_digits import baselines, data, results
from experiments.shards import pixels_of, sound_of
from experiments.speech import DIGITS, VARIANTS, Speaker
from tests.experiments.tools import built, texts
from tests.finetune.test_finetune import megapar


def test_the_samples(tmp_path: Path) -> None:
    train, valid = built(lambda folder, seed: data.build(folder, seed, {"train": 60, "valid": 20}), tmp_path)
    assert (len(train), len(valid)) == (60, 20)
    for sample in train + valid:
        assert sorted(sample) == ["cls", "png", "txt", "wav"]
        assert pixels_of(sample["png"]).shape == (16, 16) and len(sound_of(sample["wav"])) == data.LENGTH
        digit = int(sample["cls"])
        assert baselines.by_matching(sample["txt"].decode())[digit] > 0.01
    assert set(texts(train, "cls")) == {str(digit) for digit in range(10)}
    rows = list(baselines.lines(train, valid))
    assert len(rows) == 2 + 7 and rows[-1].endswith("| picture and sound and word |")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_all_three_are_of_the_class(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the split."""
    made: dict[str, Any] = {}

    def speak(word: str, speaker: Speaker) -> np.ndarray:
        made.update(word=word, speaker=speaker)
        return np.ones(100)

    def spoil(picture: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        made.update(picture=picture.tobytes())
        return np.zeros((16, 16), dtype=np.uint8)

    monkeypatch.setattr(data, "spoken", speak)
    monkeypatch.setattr(data, "spoiled", spoil)
    monkeypatch.setattr(data, "HIDDEN", 0.0)
    pictures, classes = data.handwritten(split, 1)
    known = {picture.tobytes(): int(digit) for picture, digit in zip(pictures, classes, strict=True)}
    for sample in data.drawn(split, 100, np.random.default_rng(0), 1):
        digit = int(sample["cls"])
        assert sample["txt"].decode() in [spelled[digit] for spelled in data.words().values()]
        assert (known[made["picture"]], made["word"]) == (digit, DIGITS[digit])
        assert made["speaker"].voice.partition("+")[2] in VARIANTS[split]


def test_pictures_are_held_out() -> None:
    (train, _), (valid, _) = (data.handwritten(split, 1) for split in ("train", "valid"))
    assert (len(train), len(valid)) == (1397, 400)
    assert not {picture.tobytes() for picture in train} & {picture.tobytes() for picture in valid}


def test_what_is_spoiled() -> None:
    """A square without ink, half of a word, and letters."""
    draw = np.random.default_rng(0)
    light = np.array([data.spoiled(np.ones((8, 8)), draw) for _ in range(200)]).astype(float)
    assert light.mean() == pytest.approx(85 * (2 - 100 / 256), rel=0.01)
    masks = [data.hidden("sechs", draw) for _ in range(500)]
    assert np.mean([mask.count("_") for mask in masks]) == pytest.approx(5 * data.HIDDEN, rel=0.05)
    assert all(seen in ("_", letter) for mask in masks for seen, letter in zip(mask, "sechs", strict=True))


def test_half_of_a_word_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "spoken", lambda word, speaker: np.ones(1000))
    monkeypatch.setattr(data, "SPEECH_TO_NOISE", 60.0)
    sounds = np.array([data.heard("one", "train", np.random.default_rng(seed)) for seed in range(20)])
    assert [round(sum(sound > 0.5)) for sound in sounds] == [500] * 20 and sounds.shape == (20, data.LENGTH)
    assert len({int(np.argmax(sound > 0.5)) for sound in sounds}) > 10


def test_words_that_fit() -> None:
    """As likely as there are words: one language or several, one digit or several."""
    posterior = baselines.by_matching("s_x")
    assert posterior.argmax() == 6 and posterior[6] > 0.99
    two = baselines.by_matching("t__")  # two, tre and två: 2 in English and Swedish, 3 in Italian and Swedish
    assert two[[2, 3]] == pytest.approx([0.5, 0.5], abs=0.01)
    assert baselines.by_matching("zzz") == pytest.approx([0.1] * 10)


@pytest.mark.more
def test_the_smoke_form(tmp_path: Path) -> None:
    """One model of all three as pp2, and one of the word alone: the table has both."""
    (tmp_path / "shards").mkdir()
    data.build(tmp_path / "shards", 1, {"train": 200, "valid": 40})
    text = results.README.read_text()
    train, evaluate = [shlex.split(line) for line in re.findall(r"^megapar (.*runs/smoke.*)$", text, re.M)]
    megapar(tmp_path, *train, f"data.cache={tmp_path / 'cache'}")
    shown = megapar(tmp_path, *evaluate)
    assert "image+audio+text" in shown and "accuracy" in shown
    word = [part.replace("runs/smoke", "runs/word") for part in (*train, "task.modalities=[text]", "parallel=single")]
    megapar(tmp_path, *word, f"data.cache={tmp_path / 'cache'}")
    megapar(tmp_path, *[part.replace("runs/smoke", "runs/word") for part in evaluate])
    copy = tmp_path / "README.md"
    copy.write_text(text)
    runs = [str(tmp_path / "runs" / name) for name in ("smoke", "word")]
    assert results.main([*runs, "--readme", str(copy)]) == 0
    rows = [
        line.split(" | ") for line in copy.read_text().splitlines() if line.startswith("| ") and line.count("|") == 4
    ]
    assert [row[0] for row in rows[:3]] == ["| what is read", "| picture and sound and word", "| picture and sound"]
    assert rows[0][1] == "one model, pp2" and all("%" in row[1] for row in rows[1:])
    assert [row[0] for row in rows if "%" in row[2]] == ["| word"]
