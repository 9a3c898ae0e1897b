"""Classification of what is said by images, sound and text together, or by any of them."""

from collections.abc import Sequence

import numpy as np

from megapar.data.media.samples import MediaSample
from megapar.tasks.kind import Figure, TaskKind
from megapar.tasks.kinds.classify import Classification
from megapar.tasks.media import MediaTask
from megapar.tasks.sampled import IGNORED


class MultimodalClassification(MediaTask, Classification):
    """A class for each sample. Losses are in nats per sample."""

    def sequence(self, sample: MediaSample) -> tuple[np.ndarray, np.ndarray]:
        return sample.text, np.full_like(sample.text, IGNORED)

    def labels(self, samples: Sequence[MediaSample], of_tokens: np.ndarray) -> np.ndarray:
        return np.array([sample.label for sample in samples])


TASK = TaskKind(
    name="multimodal_classify",
    about="classes of images, sound and text",
    make=MultimodalClassification,
    loss=Figure("loss", "nats/sample", 4),
    figures=(Figure("val_accuracy", "accuracy", 4),),
)
