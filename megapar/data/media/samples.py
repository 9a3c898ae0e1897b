"""What a task gets of media."""

from dataclasses import dataclass

import numpy as np

IMAGE, AUDIO = -1, -2  # where an image and a sound stand among the tokens of a text


@dataclass(frozen=True)
class MediaSample:
    """A sample.

    images: uint8 [height, width, model.image.channels] each
    clips: its sounds, float32 [n] each, mono, in -1..1, at model.audio.rate
    text: tokens int64 [n] that the model reads; every image stands there as IMAGE and every sound as AUDIO, in the
        order of `images` and `clips`
    target: tokens int64 [n] that it is to write, the end of text last; empty without
    label: number of its class; -1 without
    """

    images: tuple[np.ndarray, ...]
    clips: tuple[np.ndarray, ...]
    text: np.ndarray
    target: np.ndarray
    label: int


@dataclass(frozen=True)
class MediaSizes:
    """Sizes of a sample. images: (height, width) in pixels; clips: of every sound its samples; text: tokens that are
    text; target: tokens, the end of text counted"""

    images: tuple[tuple[int, int], ...]
    clips: tuple[int, ...]
    text: int
    target: int
