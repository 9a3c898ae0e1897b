"""What can't be used of media is named before a rank starts, or left out and counted; and what an index says holds."""

import gzip
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapar.config.derive import resolve
from megapar.config.errors import ConfigError, UserError
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.data.media.samples import IMAGE
from tests.data.shards import beep, opened, png, prepared, samples, wav, write_loose, write_shard

SKIP = ", or use data.on_error=skip"
# By name: files beside a good sample's, what the error begins with, and what it says.
BAD: dict[str, tuple[dict[str, bytes], str, str]] = {
    "no image": ({"k.png": b"text"}, "k.png", r"can't be read (cannot identify image file)"),
    "cut image": ({"k.png": png()[:-300]}, "k.png", r"can't be read (image file is truncated"),
    "damaged image": ({"k.png": png()[:60] + b"!!" + png()[62:]}, "k.png", r"can't be read ("),
    "cut sound": ({"k.wav": beep()[:-30]}, "k.wav", "can't be read (cut short: 35 of 50 samples)"),
    "no sound": ({"k.wav": b"text" * 20}, "k.wav", "can't be read (file does not start with RIFF id)"),
    "cut header": ({"k.wav": beep()[:30]}, "k.wav", "can't be read (cut short)"),
    "silence": ({"k.wav": wav(np.zeros((0, 1), int))}, "k.wav", "can't be read (no samples in it)"),
    "no flac": ({"k.flac": b"fLaC"}, "k.flac", "can't be read ("),
    "empty": ({"k.txt": b""}, "k.txt", "can't be read (no text in it)"),
    "blank": ({"k.txt": b"a", "k.target.txt": b" \n"}, "k.target.txt", "can't be read (no text in it)"),
    "Latin-1": ({"k.txt": b"na\xefve"}, "k.txt", "can't be read (not UTF-8 at byte 2)"),
    "no JSON": ({"k.json": b'{"text": '}, "k.json", "can't be read (not JSON (Expecting value at column 10))"),
    "a list": ({"k.json": b"[]"}, "k.json", "can't be read (a list, not an object)"),
    "a number": ({"k.json": b'{"label": 3}'}, "k.json", 'can\'t be read ("label" is a number)'),
    "blank in JSON": ({"k.json": b'{"text": " "}'}, "k.json", 'can\'t be read ("text" is blank)'),
    "two texts": (
        {"k.json": b'{"text": "a"}', "k.txt": b"a"},
        "k.txt",
        "a second text beside {at}k.json; keep one of them",
    ),
    "one name": ({"k.PNG": png(), "k.png": png()}, "k.PNG", "there are 2 of that name; keep one of them"),
    "marks": (
        {"k.txt": b"<image> <image>", "k.png": png()},
        "k",
        "the text has <image> 2 times, and there are 1; add what is missing, or take the mark out",
    ),
    "audio marks": ({"k.txt": b"<audio>"}, "k", "the text has <audio> 1 times, and there are 0; add"),
    "nothing": ({"k.cls": b"a"}, "k", "has no image, sound or text; add one, or remove it"),
}


@pytest.mark.parametrize("loose", [False, True], ids=["shard", "loose"])
@pytest.mark.parametrize("case", BAD)
def test_a_broken_sample_is_named_or_left_out(case: str, loose: bool, tmp_path: Path) -> None:
    given, name, problem = BAD[case]
    every = {"a.txt": b"a thing"} | given | {"z.txt": b"z"}
    path = write_loose(tmp_path / "loose", every) if loose else write_shard(tmp_path / "a.tar", every)
    start = f"{path}{'/' if loose else ':'}{name}: {problem.format(at='' if loose else 'a.tar:')}"
    with pytest.raises(UserError) as refused:
        prepared(tmp_path, path)
    text = str(refused.value)
    assert text.startswith(start) and text.endswith(SKIP) and "\n" not in text
    if problem.startswith("can't"):
        assert text.endswith(f"); mend or remove it{SKIP}")
    said: list[str] = []
    found = opened(prepared(tmp_path, path, said.append, on_error="skip"))
    assert said[-1] == f"data: {path.stem}: 1 of 3 samples are left out, the first: {text.removesuffix(SKIP)}"
    assert found.num_samples == 2


def test_what_was_left_out_is_remembered(tmp_path: Path) -> None:
    """The index that another run made without it is not used in silence."""
    path = write_shard(tmp_path / "a.tar", {"a.txt": b"a", "k.png": b"", "l.png": b"", "z.txt": b"z"})
    first: list[str] = []
    again: list[str] = []
    prefix = prepared(tmp_path, path, first.append, on_error="skip").prefix
    assert prepared(tmp_path, path, again.append, on_error="skip").prefix == prefix and again == first[-1:]
    with pytest.raises(UserError, match=rf"^{path}:k.png: can't be read \(.*\); mend or remove it{SKIP}$"):
        prepared(tmp_path, path)


def test_all_are_broken(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"a.png": b"a", "b.png": b"b"})
    problem = r"a.tar:a.png: can't be read \(.*\); mend or remove it, as no other sample of data.path can be used$"
    with pytest.raises(UserError, match=problem):
        prepared(tmp_path, path, on_error="skip")
    good = write_shard(tmp_path / "b.tar", {"a.txt": b"a", "b.png": b"b"})
    with pytest.raises(UserError, match=problem.replace("data.path", "data.valid")):
        prepared(tmp_path, good, valid=str(path), on_error="skip")


def cut(path: Path, size: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("size", "left", "problem"),
    [
        (0, "", "empty file"),
        (100, "", "truncated header"),
        (700, "", "cut short in 0.txt"),
        (1024, "", "cut short or damaged at byte 1024"),  # where 1.txt begins
        (1124, "", "cut short or damaged at byte 1024"),
        (1600, "0", "cut short in 1.txt"),
        (2048, "0", "cut short or damaged at byte 2048"),  # in front of the zeros that close it
    ],
)
def test_a_shard_that_is_cut_short(size: int, left: str, problem: str, tmp_path: Path) -> None:
    """The sample that is cut, or that may have had more files, is left out if so asked, and those before it are not."""
    path = write_shard(tmp_path / "a.tar", {"0.txt": b"a" * 300, "1.txt": b"b" * 300})
    cut(path, size)
    with pytest.raises(UserError, match=rf"^{path}: can't be read \({problem}\); mend or remove it{SKIP}$"):
        prepared(tmp_path, path)
    write_shard(tmp_path / "b.tar", {"z.txt": b"z"})
    said: list[str] = []
    found = opened(prepared(tmp_path, tmp_path / "{a,b}.tar", said.append, on_error="skip"))
    kept = [f"{path}:{key}" for key in left] + [f"{tmp_path}/b.tar:z"]
    assert [found.records.where(record) for record in range(len(found.records))] == kept
    count = f"1 of {len(kept) + 1} samples are left out"
    assert (
        said[-1] == f"data: {tmp_path.name}: {count}, the first: {path}: can't be read ({problem}); mend or remove it"
    )


def test_what_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"text " * 300)
    with pytest.raises(UserError, match=r"a.tar: can't be read \(.*\); mend or remove it, or use data.on_error=skip$"):
        prepared(tmp_path, tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere.tar", "no such file; name a .tar shard, a pattern of shards, or a folder"),
        ("a-{000..003}.tar", "3 of 4 shards are missing, the first .*a-001.tar; name a"),
        ("b.tar.gz", "b.tar.gz is no shard; name .tar files, not compressed, or a folder of files"),
        ("empty", r"the folder has no files in it"),
        ("texts", r"no file of a sample in it, but no ending, .md; docs/media.md has the endings"),
        ("none.tar", r"/none.tar: no file of a sample in it; docs/media.md has the endings"),
    ],
)
def test_no_media(path: str, problem: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "a-000.tar", {"a.txt": b"a"})
    write_shard(tmp_path / "none.tar", {})
    write_loose(tmp_path, {"b.tar.gz": b"a", "texts/README.md": b"a", "texts/LICENSE": b"a"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"^data.path=.*{problem}"):
        prepared(tmp_path, tmp_path / path)
    with pytest.raises(ConfigError, match=f"^data.valid=.*{problem}"):
        prepared(tmp_path, tmp_path / "a-000.tar", valid=str(tmp_path / path))


def test_files_that_are_not_used_are_counted_once(tmp_path: Path) -> None:
    given = {"a.txt": b"a", "a.xml": b"b", "b.xml": b"c", "README": b"d", "v1.0/.hidden.txt": b"e", "v1.0/b.txt": b"f"}
    path = write_shard(tmp_path / "s" / "a.tar", given)
    write_loose(path.parent, {"list.csv": b"g"})
    said: list[str] = []
    found = prepared(tmp_path, path.parent, said.append)
    assert said[0] == "data: a: 5 files not used: 2 .xml, 1 .csv, 1 no ending, 1 .txt"
    assert len(said) == 2 and opened(found).num_samples == 2
    assert prepared(tmp_path, path.parent, said.append) == found and len(said) == 2


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"k.png": png(0, 16, 24)},
            "an image of 16 x 24 pixels (height x width), not multiples of model.image.patch=16",
        ),
        ({"k.0.png": png(), "k.1.png": png(0, 8, 16)}, "an image of 8 x 16 pixels (height x width), not multiples of"),
        ({"k.wav": beep(rate=8000)}, "a sound of 8000 Hz, where model.audio.rate=16000; resample it"),
    ],
)
def test_a_sample_that_the_model_can_not_use(given: dict[str, bytes], problem: str, tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"a.png": png(), "b.wav": beep()} | given | {"z.txt": b"z"})
    ready = prepared(tmp_path, path)
    with pytest.raises(UserError) as refused:
        opened(ready)
    assert str(refused.value).startswith(f"{path}:k: {problem}") and str(refused.value).endswith(SKIP)
    found = opened(ready, **{"data.on_error": "skip"})
    text = str(refused.value).removesuffix(SKIP)
    assert found.left_out == f"1 of 4 samples can't be used and are left out, the first: {text}"
    kinds = [(len(one.images), len(one.clips)) for one in found.batch(range(3))]
    assert sorted(kinds) == [(0, 0), (0, 1), (1, 0)]
    alone = prepared(tmp_path, write_shard(tmp_path / "b.tar", given))
    with pytest.raises(UserError, match=r"b.tar:k: a.*, as no other sample can be used$"):
        opened(alone, **{"data.on_error": "skip"})


def test_an_index_is_used_again_and_made_anew_when_a_shard_changes(
    tmp_path: Path, flip: Callable[[str, int], None]
) -> None:
    path = write_shard(tmp_path / "a.tar", samples())
    said: list[str] = []
    first = prepared(tmp_path, path, said.append)
    made = os.stat(f"{first.prefix}.media.npz").st_mtime_ns
    assert prepared(tmp_path, path, said.append) == first and len(said) == 1
    assert os.stat(f"{first.prefix}.media.npz").st_mtime_ns == made
    Path(f"{first.prefix}.media.npz").write_bytes(b"cut")
    assert prepared(tmp_path, path, said.append) == first and len(said) == 2
    flip(str(path), path.read_bytes().index(b"a thing 3") + 2)  # thing -> uhing, of the same length
    second = prepared(tmp_path, path, said.append)
    assert second.prefix != first.prefix and len(said) == 3


def test_a_file_that_changes_under_a_run(tmp_path: Path, flip: Callable[[str, int], None]) -> None:
    path = write_shard(tmp_path / "a.tar", {"a.wav": beep(1), "b.wav": beep(2)})
    found = opened(prepared(tmp_path, path), "train")
    order = [found.records.where(found.order.item(index)) for index in range(2)]
    good, bad = order.index(f"{path}:a"), order.index(f"{path}:b")
    flip(str(path), path.read_bytes().index(beep(2)) + 60)
    found.batch([good])
    problem = "has changed since the index of its media was made; stop, and start anew"
    with pytest.raises(UserError, match=f"^{path}:b: {problem}$"):
        found.batch([bad])
    cut(path, 100)
    with pytest.raises(UserError, match=f"^{path}:a: {problem}$"):
        found.batch([good])


@pytest.mark.parametrize(
    ("module", "given", "problem"),
    [
        ("PIL", {"a.png": png()}, "images are read by Pillow, which is not installed"),
        (
            "soundfile",
            {"a.flac": b"fLaC"},
            "flac, ogg and wav that is not PCM are read by soundfile, which is not inst",
        ),
    ],
)
def test_libraries_that_are_missing(
    module: str, given: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However broken samples are treated. Without such files they are not needed."""
    monkeypatch.setitem(sys.modules, module, None)
    path = write_shard(tmp_path / "a.tar", given)
    with pytest.raises(UserError, match=rf"^data.source=media: {problem}.*; pip install 'megapar\[experiments\]'$"):
        prepared(tmp_path, path, on_error="skip")
    plain = write_shard(tmp_path / "b.tar", {"a.wav": beep(), "a.txt": b"a"})
    assert len(opened(prepared(tmp_path, plain)).batch([0])[0].clips) == 1


def test_other_channels_than_an_image_has(tmp_path: Path) -> None:
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", {"a.png": png()}))
    assert opened(ready, **{"model.image.channels": 1}).batch([0])[0].images[0].shape == (16, 32, 1)


def test_samples_that_the_context_does_not_hold(tmp_path: Path) -> None:
    """Of 16 x 32 pixels an image is 8 patches of 8, a sound of 400 samples at 16 kHz 5 tokens of two frames."""
    files = {f"{name}.png": png(height=height) for name, height in (("a", 16), ("b", 32))}
    files |= {"a.wav": beep(count=400), "a.txt": b"xy", "b.txt": b"xyz", "a.target.txt": b"z", "b.target.txt": b""}
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", files | {"b.target.txt": b"zz"}))
    keys: dict[str, Any] = {"model.image.patch": 8, "model.audio.frames": 1, "model.audio.hop_ms": 5.0}
    found = opened(ready, **keys)
    tokens = found.records.tokens(found.model).tolist()
    text, target = found.records.lengths.T
    assert tokens == [8 + 5 + int(text[0]) - 2 + int(target[0]) - 1, 16 + int(text[1]) - 1 + int(target[1]) - 1]
    of_images = found.records.tokens(found.model, ["image"]).tolist()
    assert of_images == [8 + int(target[0]) - 1, 16 + int(target[1]) - 1]
    most = {"train.seq_length": tokens[0]}
    with pytest.raises(UserError, match=rf"a.tar:b: {tokens[1]} tokens, of which at most {tokens[0]} fit"):
        opened(ready, **keys, **most)
    assert opened(ready, **keys, **most, **{"data.too_long": "skip"}).num_samples == 1
    with pytest.raises(ConfigError, match="images and sounds can't be cut short"):
        opened(ready, **keys, **most, **{"data.too_long": "truncate"})


def test_media_without_an_encoder_are_not_read(tmp_path: Path) -> None:
    ready = prepared(tmp_path, write_shard(tmp_path / "a.tar", samples(3)))
    found = opened(ready, **{"model.image.layers": 0, "model.audio.rate": 16000})
    [sample] = found.batch([0])
    assert not sample.images and len(sample.clips) == 1 and sample.text.tolist().count(IMAGE) == 0
    [sample] = opened(ready).batch([0], ["image"])
    assert sample.images[0].any() and not sample.clips[0].any() and len(sample.clips[0]) >= 40


def test_what_a_task_can_not_learn_from(tmp_path: Path) -> None:
    """Named, or left out and counted: without a label or a target, or with nothing that is read."""
    files = {f"{name}.{ending}": data for name in "abc" for ending, data in (("txt", b"xy"), ("target.txt", b"z"))}
    files |= {"a.cls": b"cat", "b.cls": b"dog", "c.png": png()}
    classify = {
        "task.name": "multimodal_classify",
        "model.output": "classes",
        "model.classes": 2,
        "model.causal": False,
    }
    writes: dict[str, Any] = {"task.name": "multimodal_lm"}
    without = {name: data for name, data in files.items() if name not in ("b.target.txt", "b.txt")}
    images, media = {"task.modalities": ["image"]}, {"task.modalities": ["image", "audio"]}
    cases: list[tuple[dict[str, bytes], dict[str, Any], str, int]] = [
        (files, classify, "a.tar:c: it has no label (.cls)", 2),
        (files | {"c.cls": b"cat"}, classify | images, "a.tar:a: it has no image, so there is", 1),
        (without | {"b.wav": beep()}, writes, "a.tar:b: it has no target (.target.txt); add one", 2),
        (files, writes | media, "a.tar:a: it has no image and no audio, so", 1),
    ]
    for number, (given, keys, problem, left) in enumerate(cases):
        ready = prepared(tmp_path / f"{number}", write_shard(tmp_path / f"{number}" / "a.tar", given))
        with pytest.raises(UserError) as refused:
            opened(ready, **keys)
        assert problem in str(refused.value) and str(refused.value).endswith(SKIP)
        found = opened(ready, **keys, **{"data.on_error": "skip"})
        assert found.num_samples == left and problem in found.left_out
    with pytest.raises(ConfigError, match=r"data.path=stdlib: all of it has one label; a classifier needs two"):
        resolve(changed(TrainConfig(), {"model.output": "classes"}), classes=1)
    alike = {name: data for name, data in files.items() if name.startswith("a")}
    assert opened(prepared(tmp_path / "y", write_shard(tmp_path / "y" / "a.tar", alike)), **writes).num_samples == 1


def test_a_compressed_shard(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", samples(2))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match=r"a.tar: can't be read \(it is compressed; unpack it with gunzip"):
        prepared(tmp_path, path)
