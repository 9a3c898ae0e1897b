"""Samples of images, sounds and text in tar shards, as `data.source=media` reads them: written here, and read again.

A shard is a tar file; a sample is all its members with one key (`000017.png`, `000017.target.txt`). A folder of data
has two folders of shards, `train` and `valid`, which is held out. Equal samples give equal files, byte by byte.
"""

import hashlib
import io
import sys
import tarfile
import wave
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import numpy as np

from experiments.packages import package
from megapar.config.errors import ConfigError, UserError
from megapar.config.schema import DataConfig
from megapar.data.prepare import cache_folder, made_once, new_folder
from megapar.data.source import Prepared, Source
from megapar.data.sources.media import SOURCE as MEDIA

Sample = dict[str, bytes]  # what follows the key and a dot, to what is in that file
Build = Callable[[Path, int], None]  # (folder, seed): writes both splits into a folder that is there

RATE = 8000  # Hz, of all sounds
PER_SHARD = 1000
SPLITS = ("train", "valid")
MADE = "made"  # as `data.path`
READERS = ("baselines.py", "results.py", "runs.py")  # files that make no data
_LOUDEST = 32767


def write_shards(folder: Path, samples: Iterable[Sample]) -> None:
    """Write samples, numbered in their order, into shards of PER_SHARD in a folder that is made for them."""
    folder.mkdir(parents=True)
    rest = enumerate(samples)
    for number in count():
        if not (here := list(islice(rest, PER_SHARD))):
            return
        with tarfile.open(folder / f"{number:03}.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
            for key, sample in here:
                for ending, content in sample.items():
                    member = tarfile.TarInfo(f"{key:06}.{ending}")  # of no owner, made at 0
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def read_shards(folder: Path) -> Iterator[Sample]:
    """The samples of a folder, in their order. Raises UserError where there are no shards."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise UserError(f"{folder}: no shards (*.tar) there; write them with the data.py of the experiment")
    for path in paths:
        with tarfile.open(path) as shard:
            found: dict[str, Sample] = {}
            for member in shard:
                key, _, ending = member.name.partition(".")
                file = shard.extractfile(member)
                assert file is not None
                found.setdefault(key, {})[ending] = file.read()
        yield from found.values()


def png(pixels: np.ndarray) -> bytes:
    """An image file of uint8 [height, width], grey, or [height, width, 3], RGB."""
    file = io.BytesIO()
    package("PIL.Image").fromarray(pixels).save(file, "png")
    return file.getvalue()


def pixels_of(content: bytes) -> np.ndarray:
    """What `png` was given."""
    with package("PIL.Image").open(io.BytesIO(content)) as image:
        return np.asarray(image)


def wav(sound: np.ndarray) -> bytes:
    """A sound file, 16 bits, mono, of floats [samples] at RATE; what is beyond -1..1 is clipped."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((np.clip(sound, -1, 1) * _LOUDEST).round().astype("<i2").tobytes())
    return file.getvalue()


def sound_of(content: bytes) -> np.ndarray:
    """What `wav` was given, to 16 bits: fp32 [samples]."""
    with wave.open(io.BytesIO(content)) as file:
        values = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return (values / _LOUDEST).astype(np.float32)


def cached(config: DataConfig, module: str, build: Build, seed: int) -> Path:
    """The folder that `build` fills, in `data.cache`: made whole or not at all, and found again.

    module: the `__file__` that `build` is in. The folder is named after the experiment, the seed and the code that
    makes it: the files of the experiment, and those that experiments share. Raises UserError.
    """
    path = Path(module).resolve()
    digest = hashlib.sha256(f"{seed}".encode())
    for each in sorted([*path.parent.glob("*.py"), *path.parents[1].glob("*.py")]):
        if each.name not in READERS:
            digest.update(each.name.encode() + each.read_bytes())
    folder = cache_folder(config) / f"{path.parent.name}-{digest.hexdigest()[:16]}"
    return made_once(folder, lambda whole: build(whole, seed))


def shards_source(module: str, about: str, build: Build, seed: int) -> Source:
    """The `SOURCE` of an experiment's data.py, `data.source` NAME of its folder: what `build` writes, read as
    `data.source=media`. `data.path` is `made`, for what is made at the first use and kept in the cache, or a folder
    that data.py wrote. module: as of `cached`"""

    def prepare(config: DataConfig, say: Callable[[str], None]) -> Prepared:
        folder = cached(config, module, build, seed) if config.path == MADE else Path(config.path).expanduser()
        if not all((folder / split).is_dir() for split in SPLITS):
            problem = f"no folder with train/ and valid/; give one that data.py wrote, or {MADE}"
            raise ConfigError("data.path", config.path, problem)
        return MEDIA.prepare(replace(config, path=str(folder / "train"), valid=str(folder / "valid")), say)

    return Source(Path(module).resolve().parent.name, about, prepare, MEDIA.open)


def write_data(arguments: Sequence[str], build: Build, seed: int) -> int:
    """The command line of a `data.py`: `FOLDER [--seed N]`, a folder that is not there yet. Returns the exit code."""
    parser = ArgumentParser(prog="data.py", description="Write the shards of an experiment, train/ and valid/.")
    parser.add_argument("folder", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=seed, help=f"of all that is drawn (default: {seed})")
    chosen = parser.parse_args(arguments)
    folder: Path = chosen.folder.expanduser().absolute()
    try:
        if folder.exists():
            raise UserError(f"{folder}: is there already; remove it or name another folder")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder.parent, folder.name) as temporary:
            build(temporary, chosen.seed)
            temporary.rename(folder)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def read_data(arguments: Sequence[str], lines: Callable[[list[Sample], list[Sample]], Iterable[str]]) -> int:
    """The command line of a `baselines.py`: `FOLDER`, which `data.py` wrote. Prints `lines(train, valid)`."""
    parser = ArgumentParser(prog="baselines.py", description="Measure the baselines of an experiment on its shards.")
    parser.add_argument("folder", type=Path, help="folder that data.py wrote")
    folder = parser.parse_args(arguments).folder
    try:
        for line in lines(*(list(read_shards(folder / split)) for split in SPLITS)):
            print(line, flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
