"""Shards, and the speech in them."""

import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import shards, speech
from experiments.shards import (
    PER_SHARD,
    RATE,
    pixels_of,
    png,
    read_data,
    read_shards,
    sound_of,
    wav,
    write_data,
    write_shards,
)
from experiments.speech import VARIANTS, Speaker, log_mel, spoken, with_noise
from megapar.config.errors import UserError
from megapar.config.schema import DataConfig


def test_what_is_written_is_read(tmp_path: Path) -> None:
    samples = [{"png": b"%d" % number, "target.txt": b"a" * (number % 3)} for number in range(PER_SHARD + 2)]
    write_shards(tmp_path / "data", samples)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["000.tar", "001.tar"]
    assert list(read_shards(tmp_path / "data")) == samples
    with tarfile.open(tmp_path / "data" / "001.tar") as shard:
        [first, *_] = shard.getmembers()
    assert (first.name, first.mtime, first.uid, first.mode) == ("001000.png", 0, 0, 0o644)
    with pytest.raises(UserError, match=r"no shards \(\*.tar\) there; write them with the data.py"):
        list(read_shards(tmp_path))


def test_media_round_trip() -> None:
    draw = np.random.default_rng(0)
    for shape in ((16, 8), (16, 8, 3)):
        pixels = draw.integers(256, size=shape, dtype=np.uint8)
        assert np.array_equal(pixels_of(png(pixels)), pixels)
    sound = np.array([0, 0.5, -1, 3, -3])
    assert np.allclose(sound_of(wav(sound)), [0, 0.5, -1, 1, -1], atol=1 / 32767)


def test_the_cache_is_made_once(tmp_path: Path) -> None:
    """And again for another seed and other code that makes it, but not for code that reads it."""
    config, made = DataConfig(cache=str(tmp_path / "cache")), []
    home = tmp_path / "experiments" / "name"
    home.mkdir(parents=True)

    def build(folder: Path, seed: int) -> None:
        made.append(seed)
        (folder / "file").write_text("")

    def cached(seed: int) -> Path:
        return shards.cached(config, str(home / "data.py"), build, seed)

    (home / "data.py").write_text("")
    folders = [cached(1), cached(1), cached(2)]
    assert made == [1, 2] and folders[0] == folders[1] != folders[2] and (folders[2] / "file").exists()
    assert folders[0].name.startswith("name-") and folders[0].parent == tmp_path / "cache"
    (home / "results.py").write_text("")
    assert cached(1) == folders[0]
    (home / "more.py").write_text("")
    (home.parent / "shared.py").write_text("")
    assert len({folders[0], cached(1)}) == 2 and made == [1, 2, 1]
    (home.parent / "shared.py").write_text("changed")
    cached(1)
    assert made == [1, 2, 1, 1]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def build(folder: Path, seed: int) -> None:
        for split in shards.SPLITS:
            write_shards(folder / split, [{"txt": b"%d" % seed}])

    arguments = [str(tmp_path / "new" / "data"), "--seed", "3"]
    assert write_data(arguments, build, 1) == 0
    assert write_data(arguments, build, 1) == 2 and "is there already" in capsys.readouterr().err
    assert read_data(arguments[:1], lambda train, valid: [str(train), str(valid)]) == 0
    assert capsys.readouterr().out == "[{'txt': b'3'}]\n" * 2
    assert read_data([str(tmp_path)], lambda train, valid: []) == 2 and "no shards" in capsys.readouterr().err


def test_speech_is_a_function_of_its_arguments() -> None:
    """Whatever was said before, and when: espeak-ng's noise, which this voice has, is seeded by seconds."""
    speaker = Speaker("en-us+f2", 175, 50)
    first = spoken("seven", speaker)
    spoken("three", Speaker("en-029+m1", 200, 30))
    time.sleep(1.1)
    spoken.cache_clear()
    assert np.array_equal(spoken("seven", speaker), first)
    assert 0.2 * RATE < len(first) < 0.64 * RATE and np.sqrt(np.mean(first**2)) == pytest.approx(0.1, rel=1e-4)
    for other in (Speaker("en-us+m3", 175, 50), Speaker("en-us+f2", 225, 50), Speaker("en-us+f2", 175, 70)):
        assert not np.array_equal(spoken("seven", other), first)


def test_voices_are_held_out() -> None:
    assert not set(VARIANTS["train"]) & set(VARIANTS["valid"])
    draw = np.random.default_rng(0)
    for split, variants in VARIANTS.items():
        speakers = [speech.draw_speaker(draw, split) for _ in range(100)]
        assert {one.voice.partition("+")[2] for one in speakers} == set(variants)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^espeak-ng can't say 'one' as xx-none"):
        spoken("one", Speaker("xx-none", 175, 50))
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    line = (
        r"^this experiment needs espeakng_loader, which is not installed \(.*\); pip install 'megapar\[experiments\]'"
    )
    with pytest.raises(UserError, match=line):
        spoken("two", Speaker("en-us+f1", 175, 50))


def test_noise_and_mel_bands() -> None:
    """The noise has the power that was asked for; a tone is loudest in the band around it."""
    silence = np.zeros(RATE)
    assert np.sqrt(np.mean(with_noise(silence, 20.0, np.random.default_rng(0)) ** 2)) == pytest.approx(0.01, rel=0.05)
    tone = np.sin(2 * np.pi * 1000 * np.arange(RATE) / RATE)
    levels = log_mel(tone)
    assert levels.shape == (98, 32) and set(levels.argmax(1)) == {14}
