"""Words spoken by espeak-ng, by many speakers, and what a classical recogniser hears of them.

The library comes as a wheel, espeakng-loader (espeak-ng is GPL-3; nothing here links to it, and its sounds are free).
"""

import _ctypes
import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

from experiments.packages import package
from experiments.shards import RATE
from megapar.config.errors import UserError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb-scotland", "en-gb-x-rp", "en-029")
VARIANTS = {  # no voice is in both
    "train": ("m1", "m2", "m3", "m5", "m6", "f1", "f2", "f4", "f5"),
    "valid": ("m4", "m7", "f3"),
}
SPEEDS = (175, 200, 225)  # words a minute
PITCHES = (30, 50, 70)  # 50 is the voice's own

_ESPEAK_RATE = 22050  # Hz
_SYNCHRONOUS, _SPEED, _PITCH, _UTF8 = 2, 1, 3, 1  # of speak_lib.h
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
_SILENCE = 0.02  # of the loudest sample: what is below it at either end is cut off
_RMS = 0.1
_FRAME, _HOP, _BANDS = 200, 80, 32  # samples (25 and 10 ms), mel bands


@dataclass(frozen=True)
class Speaker:
    """Who speaks, and how. voice: as espeak-ng has it, `en-us+f2`; speed: words a minute; pitch: 0 to 99"""

    voice: str
    speed: int
    pitch: int


def draw_speaker(draw: np.random.Generator, split: str) -> Speaker:
    """A speaker of that split: none of `train` has a voice of `valid`."""
    voice = f"{draw.choice(ACCENTS)}+{draw.choice(VARIANTS[split])}"
    return Speaker(voice, int(draw.choice(SPEEDS)), int(draw.choice(PITCHES)))


@cache
def spoken(text: str, speaker: Speaker) -> np.ndarray:
    """A text as a speaker says it, without silence around it: fp32 [samples] at RATE, of equal loudness.

    A function of its arguments alone: espeak-ng keeps its oscillators' phase from one text to the next and seeds its
    noise by the clock, so the library is loaded anew for every text (2 ms) and seeded here.

    Raises UserError where the package is missing or espeak-ng refuses the voice.
    """
    wheel = package("espeakng_loader")
    blocks: list[np.ndarray] = []

    def take(samples: "ctypes._Pointer[ctypes.c_short]", count: int, events: int | None) -> int:
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).astype(np.float64))
        return 0

    callback = _CALLBACK(take)
    library = ctypes.CDLL(wheel.get_library_path())
    try:
        library.espeak_Initialize(_SYNCHRONOUS, 0, wheel.get_data_path().encode(), 0)
        library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        library.espeak_SetSynthCallback(callback)
        refused = library.espeak_SetVoiceByName(speaker.voice.encode())
        library.espeak_SetParameter(_SPEED, speaker.speed, 0)
        library.espeak_SetParameter(_PITCH, speaker.pitch, 0)
        words = text.encode()
        refused = refused or library.espeak_Synth(words, ctypes.c_size_t(len(words) + 1), 0, 0, 0, _UTF8, None, None)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    if refused or not blocks:
        raise UserError(
            f"espeak-ng can't say {text!r} as {speaker.voice}; pip install -c constraints.txt espeakng-loader"
        )
    sound = package("scipy.signal").resample_poly(np.concatenate(blocks), RATE, _ESPEAK_RATE)
    loud = np.flatnonzero(np.abs(sound) > _SILENCE * np.abs(sound).max())
    sound = sound[loud[0] : loud[-1] + 1]
    return (sound * _RMS / np.sqrt(np.mean(sound**2))).astype(np.float32)


def with_noise(sound: np.ndarray, ratio: float, draw: np.random.Generator) -> np.ndarray:
    """A sound with white noise. ratio: of speech, as `spoken` has it, to noise, in dB"""
    return sound + draw.normal(0, _RMS * 10 ** (-ratio / 20), len(sound))


def log_mel(sound: np.ndarray) -> np.ndarray:
    """The logarithm of the energy in mel bands (HTK's scale), fp64 [frames, bands]: a frame of 25 ms every 10 ms."""
    padded = np.pad(sound, (0, max(0, _FRAME - len(sound))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _FRAME)[::_HOP] * np.hanning(_FRAME)
    return np.log(np.abs(np.fft.rfft(frames)) ** 2 @ _filters() + 1e-6)


@cache
def _filters() -> np.ndarray:
    """Triangles over the frequencies of a frame, fp64 [frequencies, bands]."""
    highest = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, _BANDS + 2) / 2595) - 1)
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    frequencies = np.fft.rfftfreq(_FRAME, 1 / RATE)[:, None]
    return np.clip(np.minimum((frequencies - low) / (middle - low), (high - frequencies) / (high - middle)), 0, None)
