"""What a task gets of media."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np

IMAGE, AUDIO = -1, -2  # where an image and a sound stand among the tokens of a text


def _no_tokens() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


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

    images: tuple[np.ndarray, ...] = ()
    clips: tuple[np.ndarray, ...] = ()
    text: np.ndarray = field(default_factory=_no_tokens)
    target: np.ndarray = field(default_factory=_no_tokens)
    label: int = -1

    def has(self, modality: str) -> bool:
        """Whether there is some of it: image, audio or text."""
        return bool((self.text >= 0).any()) if modality == "text" else len(self.of(modality)) > 0

    def of(self, medium: str) -> tuple[np.ndarray, ...]:
        """Its images, or its sounds (`audio`)."""
        return self.images if medium == "image" else self.clips

    def only(self, modalities: Collection[str]) -> "MediaSample":
        """Without the others, and their marks in the text."""
        images, clips = (self.of(name) if name in modalities else () for name in ("image", "audio"))
        marks = {"image": IMAGE, "audio": AUDIO}
        left = np.isin(self.text, [marks[name] for name in modalities if name in marks])
        if "text" in modalities:
            left |= self.text >= 0
        return replace(self, images=images, clips=clips, text=self.text[left])


_MARK = re.compile("(<image>|<audio>)")
_MARKS = {"<image>": IMAGE, "<audio>": AUDIO}


def first_mark(text: str) -> str:
    """`<image>` or `<audio>`, whichever a text has first; empty without."""
    found = _MARK.search(text)
    return found[1] if found else ""


def marked(text: str, images: int, sounds: int) -> list[str | int]:
    """A text in pieces, with IMAGE and AUDIO where it has `<image>` and `<audio>`; media that it does not name stand in
    front, images first. Raises ValueError where it names more than there are."""
    pieces: list[str | int] = [_MARKS.get(piece, piece) for piece in _MARK.split(text) if piece]
    front: list[str | int] = []
    for mark, there in (("<image>", images), ("<audio>", sounds)):
        if (named := pieces.count(_MARKS[mark])) > there:
            raise ValueError(f"the text has {mark} {named} times, and there are {there}")
        front += [_MARKS[mark]] * (there - named)
    return [*front, *pieces]


@dataclass(frozen=True)
class MediaSizes:
    """Sizes of a sample. images: (height, width) in pixels; clips: of every sound its samples; text: tokens that are
    text; target: tokens, the end of text counted"""

    images: tuple[tuple[int, int], ...]
    clips: tuple[int, ...]
    text: int
    target: int
