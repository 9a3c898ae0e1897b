"""Text about images and sound, as captions, transcripts and answers: next-token prediction of targets alone."""

import numpy as np

from megapar.data.media.samples import MediaSample
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.kinds.sft import FineTuning
from megapar.tasks.media import MediaTask
from megapar.tasks.sampled import IGNORED


class MultimodalLanguageModeling(MediaTask, FineTuning):
    """A target behind what is read, to a sample. Losses are in nats per token of a target, all of a step alike."""

    def sequence(self, sample: MediaSample) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.concatenate([sample.text, sample.target])
        learned = np.arange(1, len(tokens)) >= len(sample.text)
        return tokens[:-1], np.where(learned, tokens[1:], IGNORED)


TASK = TaskKind(
    name="multimodal_lm",
    about="text about images and sound",
    make=MultimodalLanguageModeling,
    loss=Figure("loss", "nats/token", 4),
)
