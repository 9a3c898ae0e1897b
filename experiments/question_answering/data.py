#!/usr/bin/env python3
"""Questions about drawn scenes and about short passages, with their answers.

python experiments/question_answering/data.py FOLDER    writes FOLDER/train/*.tar and FOLDER/valid/*.tar
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]

from experiments.drawings import picture  # noqa: E402
from experiments.question_answering.passages import draw_passage  # noqa: E402
from experiments.question_answering.scenes import draw_question  # noqa: E402
from experiments.shards import Sample, png, shards_source, write_data, write_shards  # noqa: E402

SEED = 1
SAMPLES = {"train": 40000, "valid": 1000}


def build(folder: Path, seed: int, samples: dict[str, int] = SAMPLES) -> None:
    """Write both splits. samples: how many of each"""
    for number, (split, count) in enumerate(samples.items()):
        write_shards(folder / split, drawn(split, count, np.random.default_rng([seed, number])))


def drawn(split: str, count: int, draw: np.random.Generator) -> Iterator[Sample]:
    """Samples in turn: about a picture, about a passage."""
    for number in range(count):
        if number % 2:
            text, answer, _ = draw_passage(draw, split)
            yield {"txt": text.encode(), "target.txt": answer.encode()}
        else:
            things, question = draw_question(draw, split)
            yield {
                "png": png(picture(things, draw)),
                "txt": f"<image> {question.text}".encode(),
                "target.txt": question.answer.encode(),
            }


SOURCE = shards_source(__file__, "questions about drawn scenes and passages", build, SEED)


if __name__ == "__main__":
    sys.exit(write_data(sys.argv[1:], build, SEED))
