"""The experiment's data and baselines."""

from pathlib import Path

import numpy as np
import pytest

from experiments.shards import RATE, sound_of, wav
from experiments.speech import VARIANTS, Speaker, spoken
from experiments.transcribe_digits import baselines, data
from tests.experiments.tools import built

SPEAKER = Speaker("en-us+m1", 175, 50)


def test_the_samples(tmp_path: Path) -> None:
    train, valid = built(lambda folder, seed: data.build(folder, seed, {"train": 40, "valid": 16}), tmp_path)
    assert all(sorted(sample) == ["target.txt", "wav"] for sample in train + valid)
    lengths = [[len(words) for words in baselines.words_of(samples)] for samples in (train, valid)]
    assert (len(train), set(lengths[0])) == (40, {1, 2, 3, 5})
    assert lengths[1][1::2] == [4] * 8 and set(lengths[1][::2]) <= {1, 2, 3, 5}
    for sample, length in zip(train + valid, lengths[0] + lengths[1], strict=True):
        assert 0.2 * length < len(sound_of(sample["wav"])) / RATE < 0.5 + 0.9 * length
    rows = list(baselines.lines(train, valid))
    assert len(rows) == 5 and rows[3].endswith("single words |")


@pytest.mark.parametrize("split", ["train", "valid"])
def test_who_speaks(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of the target, all by one speaker, who is one of the split's."""
    said: list[tuple[str, Speaker]] = []

    def speak(word: str, speaker: Speaker) -> np.ndarray:
        said.append((word, speaker))
        return np.ones(100)

    monkeypatch.setattr(data, "spoken", speak)
    for sample in data.drawn(split, 50, np.random.default_rng(0)):
        words, speakers = zip(*said, strict=True)
        assert " ".join(words) == sample["target.txt"].decode() and len(set(speakers)) == 1
        assert speakers[0].voice.partition("+")[2] in VARIANTS[split]
        said.clear()


def test_what_is_said_is_in_the_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "SPEECH_TO_NOISE", 80.0)
    sound = data.said(["one", "two"], SPEAKER, np.random.default_rng(0))
    at = 0
    for word in (spoken("one", SPEAKER), spoken("two", SPEAKER)):
        match = np.correlate(sound[at:], word, "valid")
        at += int(match.argmax())
        assert np.allclose(sound[at : at + len(word)], word, atol=1e-3)
        at += len(word)


def test_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long pauses cut, none doesn't; a word is nearest to itself."""
    monkeypatch.setattr(data, "PAUSES", (0.3, 0.3))
    digits = ["zero", "one", "five"]
    draw = np.random.default_rng(0)
    train = [
        {"wav": wav(data.said([word], SPEAKER, draw)), "target.txt": word.encode()} for word in digits for _ in range(3)
    ]
    valid = [{"wav": wav(data.said(digits, SPEAKER, draw)), "target.txt": b"zero one five"}] * 2
    assert len(baselines.pieces(valid[0])) == 3
    features, labels = baselines.single_words(train)
    assert features.shape == (9, 12 * 32) and list(labels) == [word for word in digits for _ in range(3)]
    valid[1] = {**valid[1], "target.txt": b"zero one five one"}
    rows = [row.split(" | ") for row in baselines.lines(train, valid)]
    assert rows[2][:4] == rows[3][:4] == ["| 50.0%", "0.0%", "100.0%", "14.3%"]
    monkeypatch.setattr(data, "PAUSES", (0.0, 0.0))
    assert len(baselines.pieces({"wav": wav(data.said(["one", "one"], SPEAKER, draw))})) == 1


def test_edits() -> None:
    pairs = [("", "a b"), ("a b", ""), ("a b c", "a c"), ("a b", "b a"), ("a x c", "a b c"), ("a", "a")]
    assert [baselines.edits(one.split(), other.split()) for one, other in pairs] == [2, 2, 1, 2, 1, 0]
