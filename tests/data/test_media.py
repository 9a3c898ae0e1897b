"""Images, sounds and text from shards and loose files: what a sample is, in which order, and what is held out."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megapar.config.errors import UserError
from megapar.data.media import decode, files
from megapar.data.media.files import OpenFiles, expanded
from megapar.data.media.samples import AUDIO, IMAGE
from megapar.data.tokenizer import open_tokenizer
from tests.data.shards import beep, encoded, opened, png, prepared, samples, wav, write_loose, write_shard


def plain(found: Any) -> list[Any]:
    """What is in samples, to compare them by."""
    media = [[one.tolist() for one in (*sample.images, *sample.clips)] for sample in found]
    return [media, [(sample.text.tolist(), sample.target.tolist(), sample.label) for sample in found]]


def halves() -> tuple[dict[str, bytes], dict[str, bytes]]:
    every = samples()
    return tuple({name: every[name] for name in every if (name < "s006") == first} for first in (True, False))  # type: ignore[return-value]


def test_four_forms_of_a_path_are_the_same_samples(tmp_path: Path) -> None:
    one = write_shard(tmp_path / "one" / "a.tar", samples())
    for number, half in enumerate(halves()):
        write_shard(tmp_path / "shards" / f"train-{number:03}.tar", {f"./{name}": half[name] for name in half})
        write_loose(tmp_path / "loose" / f"sub.{number}", half)
    paths = [one, one.parent, tmp_path / "shards", tmp_path / "shards" / "train-{000..001}.tar", tmp_path / "loose"]
    found = [opened(prepared(tmp_path, path, split=0.3), "valid") for path in paths]
    assert 0 < found[0].num_samples < 12
    found += [opened(prepared(tmp_path, path, split=0.3)) for path in paths]
    batches = [plain(samples.batch(range(samples.num_samples))) for samples in found]
    assert all(batch == batches[0] for batch in batches[:5]) and all(batch == batches[5] for batch in batches[5:])
    assert found[0].labels == ["cat", "dog"]
    keys = [name.partition(".")[0] for name in samples()]
    places = {f"{tmp_path}/loose/sub.{int(key > 's005')}/{key}" for key in keys}
    assert {found[4].records.where(0), found[-1].records.where(3)} < places
    assert found[3].records.where(0) in {f"{tmp_path}/shards/train-00{int(key > 's005')}.tar:./{key}" for key in keys}


def test_what_a_sample_is(tmp_path: Path) -> None:
    given = {name: data for name, data in samples(1).items() if not name.endswith("cls")}
    found = prepared(tmp_path, write_shard(tmp_path / "a.tar", given))
    assert (found.vocab_size, found.classes, found.samples) == (330, None, "media")
    [sample] = opened(found).batch([0])
    assert found.tokenizer_path is not None
    tokenizer = open_tokenizer(found.tokenizer_path)
    assert [image.shape for image in sample.images] == [(16, 32, 3), (32, 16, 3)]
    for image, data in zip(sample.images, (png(0), png(100, 32, 16)), strict=True):
        assert image.dtype == np.uint8 and np.array_equal(image, np.asarray(Image.open(io.BytesIO(data))))
    [clip] = sample.clips
    assert clip.dtype == np.float32
    assert np.array_equal(clip, np.random.default_rng(0).integers(-(2**15), 2**15, 40) / np.float32(2**15))
    text = [IMAGE, AUDIO, *tokenizer.encode("what is "), IMAGE, *tokenizer.encode(" in 0")]
    assert sample.text.tolist() == text and sample.text.dtype == sample.target.dtype == np.int64
    assert sample.target.tolist() == [*tokenizer.encode("a thing 0"), tokenizer.end_of_text]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "IIA"),
        ("a", "IIAa"),
        ("<image>a", "IAIa"),
        ("a<image><image>b<audio>", "aIIbA"),
        ("<audio> <image>", "IA I"),
    ],
)
def test_where_media_stand(text: str | None, expected: str, tmp_path: Path) -> None:
    sounds = {"k.0.png": png(0), "k.1.png": png(1), "k.wav": beep()}
    given = {} if text is None else {"k.txt": text.encode()}
    found = prepared(tmp_path, write_shard(tmp_path / "a.tar", sounds | given))
    [sample] = opened(found).batch([0])
    assert found.tokenizer_path is not None
    tokenizer = open_tokenizer(found.tokenizer_path)
    marks = {IMAGE: "I", AUDIO: "A"}
    read = [marks.get(token) or tokenizer.decode([token]) for token in sample.text.tolist()]
    assert "".join(read) == expected
    assert len(sample.target) == 0 and sample.label == -1


def test_several_media_by_the_numbers_in_their_names(tmp_path: Path) -> None:
    numbers = [0, 10, 2, 1, 9]
    found = {f"k.{number}.png": png(number, 16, 16) for number in numbers}
    found |= {f"k.{number}.wav": beep(number, 10 + number) for number in numbers}
    [sample] = opened(prepared(tmp_path, write_shard(tmp_path / "a.tar", found))).batch([0])
    assert [len(clip) for clip in sample.clips] == [10, 11, 12, 19, 20]
    for image, number in zip(sample.images, sorted(numbers), strict=True):
        assert encoded(Image.fromarray(image)) == png(number, 16, 16)


def test_values_from_json(tmp_path: Path) -> None:
    """The same as from files of their own; other keys are not read."""
    one = {"k.txt": b"a", "k.target.txt": b"b", "k.cls": b" cat \n", "l.txt": b"c", "l.cls": b"dog"}
    two = {"k.json": b'{"text": "a", "target": "b", "label": "cat", "url": 3}', "l.json": b'{"text":"c","label":"dog"}'}
    batches = []
    for name, given in (("one", one), ("two", two)):
        found = opened(prepared(tmp_path, write_shard(tmp_path / f"{name}.tar", given)))
        batches.append(plain(found.batch([0, 1])))
    assert batches[0] == batches[1] and sorted(label for *_, label in batches[0][1]) == [0, 1]


def test_sizes_are_those_of_batches_and_open_no_file(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", samples())
    ready = prepared(tmp_path, shard)
    batch = opened(ready).batch(range(30))
    shard.unlink()
    again = opened(ready)
    for index, sample in enumerate(batch):
        sizes = again.sizes(index)
        assert sizes.images == tuple(image.shape[:2] for image in sample.images)
        assert sizes.clips == tuple(len(clip) for clip in sample.clips)
        assert sizes.text == (sample.text >= 0).sum() and sizes.target == len(sample.target)
    with pytest.raises(UserError, match=rf"^{shard}: can't be read \(No such file .*\); put it back, or start anew$"):
        again.batch([0])


def test_every_epoch_has_all_in_another_order(tmp_path: Path) -> None:
    """And a sample is a function of its number alone, so a run goes on where it stopped."""
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", samples()))
    found = opened(ready)
    epochs = [plain(found.batch(range(epoch * 12, epoch * 12 + 12)))[1] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert len(set(map(str, epochs[0]))) == 12
    assert plain(opened(ready).batch(range(20, 24)))[1] == epochs[1][8:]
    assert plain(opened(ready, **{"train.seed": 9}).batch(range(12)))[1] != epochs[0]


def test_groups_are_held_out_together(tmp_path: Path) -> None:
    given = {}
    for number in range(40):
        given[f"k{number}.json"] = f'{{"text": "a {number}", "group": "g{number % 8}"}}'.encode()
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", given), split=0.3)
    sides = {}
    for split in ("train", "valid"):
        records = opened(ready, split).records
        numbers = [int(records.where(record).partition(":k")[2]) for record in range(len(records))]
        assert all((number % 8 in {other % 8 for other in numbers}) for number in numbers)
        sides[split] = {number % 8 for number in numbers}
    assert sides["train"] and sides["valid"] and not sides["train"] & sides["valid"]


def test_equal_media_and_texts_are_held_out_together(tmp_path: Path) -> None:
    given = {f"k{number:02}.png": png(number % 5) for number in range(30)}
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", given), split=0.3)
    sides = []
    for split in ("train", "valid"):
        records = opened(ready, split).records
        sides.append({int(records.where(record)[-2:]) % 5 for record in range(len(records))})
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_a_path_of_its_own_is_held_out(tmp_path: Path) -> None:
    first, second = halves()
    write_shard(tmp_path / "t" / "a.tar", first)
    valid = write_loose(tmp_path / "v", second)
    ready = prepared(tmp_path, tmp_path / "t", valid=str(valid))
    found = [opened(ready, split) for split in ("train", "valid")]
    assert [one.num_samples for one in found] == [6, 6]
    names = [[one.records.where(record)[-4:] for record in range(6)] for one in found]
    assert names == [[f"s00{n}" for n in range(6)], ["s006", "s007", "s008", "s009", "s010", "s011"]]
    for record in range(6):
        assert encoded(Image.fromarray(found[1].records.images(record, 3)[0])) == png(6 + record)


def test_media_without_any_text(tmp_path: Path) -> None:
    """There is no tokenizer then, and no token but one."""
    given = {name: data for name, data in samples().items() if not name.endswith("txt")}
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", given), tokenizer="bpe")
    assert (ready.tokenizer_path, ready.vocab_size, ready.max_token, ready.classes) == (None, 1, 0, 2)
    batch = opened(ready, **{"model.vocab_size": 61}).batch(range(12))
    assert sorted(sample.text.tolist() for sample in batch) == [[-1, -2]] * 8 + [[-1, -1, -2]] * 4
    assert {sample.label for sample in batch} == {0, 1}


def test_a_tokenizer_is_trained_on_texts_and_targets(tmp_path: Path) -> None:
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", samples()), tokenizer="bpe", vocab_size=282)
    assert ready.vocab_size == 282 and ready.tokenizer_path is not None
    [sample] = opened(ready).batch([0])
    read, written = (
        open_tokenizer(ready.tokenizer_path).decode(part[part >= 0]) for part in (sample.text, sample.target)
    )
    assert read.startswith("what is  in ") and written.startswith("a thing ")


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_of_every_width(width: int) -> None:
    """Full scale is 1, and two channels are averaged."""
    top = 2 ** (8 * width - 1)
    values = np.array([[0, 0], [top - 1, top - 1], [-top, -top], [top // 2, -top // 4]])
    found, rate = decode.sound(wav(values, width, 8000))
    assert rate == 8000 and found.dtype == np.float32
    assert found.tolist() == [0, np.float32((top - 1) / top), -1, 0.125]


def test_sounds_that_the_standard_library_does_not_read() -> None:
    soundfile = pytest.importorskip("soundfile")
    values = np.random.default_rng(0).integers(-(2**15), 2**15, (200, 2), dtype=np.int16)
    truth = values.mean(axis=1) / 2**15
    for kind, subtype in (("FLAC", "PCM_16"), ("WAV", "FLOAT"), ("WAVEX", "PCM_16")):
        data = io.BytesIO()
        soundfile.write(data, values if subtype == "PCM_16" else values / 2**15, 16000, format=kind, subtype=subtype)
        found, rate = decode.sound(data.getvalue())
        assert rate == 16000 and np.abs(found - truth).max() < 1e-6
    soundfile.write(data := io.BytesIO(), values, 16000, format="OGG", subtype="VORBIS")
    assert decode.sound(data.getvalue())[0].shape == (200,)
    soundfile.write(data := io.BytesIO(), [3.0, -2.0, 0.5], 16000, format="WAV", subtype="FLOAT")
    assert decode.sound(data.getvalue())[0].tolist() == [1.0, -1.0, 0.5]
    soundfile.write(data := io.BytesIO(), [0.0, np.nan], 16000, format="WAV", subtype="FLOAT")
    with pytest.raises(decode.Undecodable, match="samples that are no numbers"):
        decode.sound(data.getvalue())


def test_images_of_every_mode() -> None:
    """Grey and RGB of whatever is stored; of 16 bits the upper ones."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L"))
    for stored, kind in ((image, "PNG"), (image, "PPM"), (image, "BMP"), (image.convert("RGBA"), "PNG")):
        assert np.array_equal(decode.pixels(encoded(stored, kind), 3), pixels)
        assert np.array_equal(decode.pixels(encoded(stored, kind), 1)[:, :, 0], grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 256 + 77)
    for kind in ("PNG", "PPM"):
        assert np.array_equal(decode.pixels(encoded(deep, kind), 1)[:, :, 0], grey)
        assert np.array_equal(decode.pixels(encoded(deep, kind), 3)[:, :, 2], grey)
    assert decode.image_size(encoded(image.convert("L"), "JPEG")) == (4, 6)
    assert decode.pixels(encoded(image, "WEBP"), 3).shape == (4, 6, 3)


def test_patterns_are_a_shells() -> None:
    assert list(expanded("a-{008..011}.tar")) == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert list(expanded("{2..0}")) == ["2", "1", "0"] and list(expanded("{9..10}")) == ["9", "10"]
    assert list(expanded("{a,bc}-{0..1}")) == ["a-0", "a-1", "bc-0", "bc-1"]
    assert list(expanded("{a}{..}{0..}")) == ["{a}{..}{0..}"]


def test_few_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_OPEN", 2)
    paths = [tmp_path / str(number) for number in range(5)]
    for number, path in enumerate(paths):
        path.write_bytes(b"abc%d" % number)
    reader = OpenFiles(paths)
    assert [reader.read(number, 2, 9) for number in (0, 1, 2, 0, 4, 3, 0)] == [
        b"c0",
        b"c1",
        b"c2",
        b"c0",
        b"c4",
        b"c3",
        b"c0",
    ]
    assert list(reader._open) == [3, 0]
    assert [reader.read(number, 0, 1) for number in (3, 1)] == [b"a", b"a"] and list(reader._open) == [3, 1]
