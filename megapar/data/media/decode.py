"""Bytes of a file to an image or a sound, in memory alone."""

import io
import wave
from typing import Any

import numpy as np

from megapar.config.errors import UserError
from megapar.config.schema import ModelConfig

FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")  # whatever a file is called, Pillow tries these alone
SOUNDFILE = (b"fLaC", b"OggS")  # what a file of that library's begins with
MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels
INSTALL = "pip install 'megapar[experiments]'"


class NotInstalled(UserError):
    """A library is missing, whatever the file."""


class Undecodable(Exception):
    """Why a file can't be decoded, in a few words."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels of an image, which is decoded whole. Raises Undecodable, or NotInstalled."""
    image = _image(data)
    return image.height, image.width


def pixels(data: bytes, channels: int) -> np.ndarray:
    """An image as uint8 [height, width, channels], of 1 channel (grey) or 3 (RGB).

    Transparency is dropped, colours become grey by ITU-R 601-2, and 16 bits their upper 8. As stored: the orientation
    that a camera notes is not applied. Raises Undecodable, or NotInstalled.
    """
    image = _image(data)
    if image.mode.startswith("I"):  # 16 bits of grey, which `convert` would clip at 255
        grey = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], channels, axis=2)
    found = np.array(image.convert(MODES[channels]), dtype=np.uint8)
    return found.reshape(*found.shape[:2], channels)


def image_of(data: bytes, model: ModelConfig) -> np.ndarray:
    """An image as a model reads it, see `pixels`. Raises Undecodable, NotInstalled, and ValueError for one that its
    patches don't divide."""
    found = pixels(data, model.image.channels)
    if any(size % model.image.patch for size in found.shape[:2]):
        size = " x ".join(map(str, found.shape[:2]))
        raise ValueError(f"{size} pixels (height x width), not multiples of model.image.patch={model.image.patch}")
    return found


def clip_of(data: bytes, model: ModelConfig) -> np.ndarray:
    """A sound as a model reads it, see `sound`. Raises Undecodable, NotInstalled, and ValueError for another rate."""
    found, rate = sound(data)
    if rate != model.audio.rate:
        raise ValueError(f"{rate} Hz, where model.audio.rate={model.audio.rate}")
    return found


def _image(data: bytes) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise NotInstalled(f"data.source=media: images are read by Pillow, which is not installed; {INSTALL}") from None
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
    except Exception as error:  # decoders raise whatever they like for damaged files
        raise Undecodable(_line(error).partition(" <_io.")[0]) from None
    return image


def sound(data: bytes) -> tuple[np.ndarray, int]:
    """A sound as float32 [n], its channels averaged, cut off at -1 and 1; and its samples per second.

    wav of 8, 16, 24 or 32 bits of PCM is read by the standard library; other wav, flac and ogg by soundfile. Raises
    Undecodable, or NotInstalled.
    """
    found = None if data[:4] in SOUNDFILE else _wave(data)
    channels, rate = _soundfile(data) if found is None else found
    if not len(channels):
        raise Undecodable("no samples in it")
    mono = channels.mean(axis=1, dtype=np.float64)
    if not np.isfinite(mono).all():
        raise Undecodable("samples that are no numbers")
    return mono.clip(-1, 1).astype(np.float32), rate


def _wave(data: bytes) -> tuple[np.ndarray, int] | None:
    """([n, channels] in -1..1, samples per second) of PCM; None for another encoding."""
    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, count = file.getsampwidth(), file.getnchannels(), file.getnframes()
            rate, raw = file.getframerate(), file.readframes(count)
    except (wave.Error, EOFError) as error:
        if str(error).startswith("unknown"):
            return None
        raise Undecodable(str(error) or "cut short") from None
    except Exception as error:  # of a damaged header
        raise Undecodable(_line(error)) from None
    if width > 4:
        raise Undecodable(f"{8 * width} bits a sample")
    if len(raw) != count * width * channels:
        raise Undecodable(f"cut short: {len(raw) // (width * channels):,} of {count:,} samples")
    if rate <= 0:
        raise Undecodable(f"a rate of {rate} Hz")
    return _scaled(raw, width).reshape(count, channels), rate


def _scaled(raw: bytes, width: int) -> np.ndarray:
    """Little-endian PCM of `width` bytes as float64 in -1..1; one byte is unsigned, more are signed."""
    if width == 1:
        return (np.frombuffer(raw, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        whole = np.zeros((len(raw) // 3, 4), np.uint8)
        whole[:, 1:] = np.frombuffer(raw, np.uint8).reshape(-1, 3)
        return whole.view("<i4")[:, 0] / 2.0**31
    return np.frombuffer(raw, f"<i{width}") / 2.0 ** (8 * width - 1)


def _soundfile(data: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: without the library that it wraps
        problem = "data.source=media: flac, ogg and wav that is not PCM are read by soundfile, which is not installed"
        raise NotInstalled(f"{problem}; {INSTALL}") from None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except Exception as error:
        raise Undecodable(_line(error).rpartition(": ")[2]) from None
    return samples, int(rate)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0] or type(error).__name__
