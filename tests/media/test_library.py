"""Images and sound in a notebook: `Model.read`."""

from typing import Any

import numpy as np
import pytest
import torch

import megapar
from megapar.config.schema import TrainConfig
from megapar.data.media.samples import AUDIO, IMAGE
from megapar.library.model import Model
from tests.media.samples import CLASSIFIES, WRITES
from tests.media.test_generate import PROMPTS, scores
from tests.tiny import tiny_config


def test_scores_and_gradients(media: dict[str, Any]) -> None:
    """Scores as of an evaluation; every encoder that something was read by has a gradient."""
    config = tiny_config(media["data.prefix"], **media | CLASSIFIES)
    expected = scores(0, 1, config, 3)
    model = Model(config)
    found = model.read(PROMPTS)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-9)
    torch.nn.functional.cross_entropy(model.read([PROMPTS[1], PROMPTS[4]]), torch.tensor([0, 1])).backward()
    moved = {name.split(".")[0] + name.split(".")[1] for name, one in model.named_parameters() if one.grad is not None
             and one.grad.abs().max() > 0}  # fmt: skip
    assert "mediaimage" in moved and "mediaaudio" not in moved
    model.close()


def test_logits_of_every_token(media: dict[str, Any]) -> None:
    model = Model(tiny_config(media["data.prefix"], **media | WRITES))
    together, behind = model.read(PROMPTS[:2], hidden=True)
    alone = model.read([PROMPTS[1]])
    assert together.shape[1] == 8 and behind["layers.1"].shape == (2, 8, 16)  # 3 of text, 2 patches, 3 of sound
    np.testing.assert_allclose(together[1, : alone.shape[1]].detach(), alone[0].detach(), rtol=0, atol=1e-9)
    model.close()


def test_what_a_model_cannot_read(media: dict[str, Any]) -> None:
    values = (
        media | WRITES | {f"model.audio.{key}": default for key, default in vars(TrainConfig().model.audio).items()}
    )
    model = Model(tiny_config(media["data.prefix"], **values))
    with pytest.raises(ValueError, match=r"one has audio, and the model has no encoder of it \(model.audio.layers\)"):
        model.read([megapar.MediaSample(clips=(np.zeros(9, dtype=np.float32),), text=np.array([AUDIO]))])
    with pytest.raises(ValueError, match=r"an image \[3, 4, 1\], and patches are 2 x 2 pixels"):
        model.read([megapar.MediaSample(images=(np.zeros((3, 4, 1), dtype=np.uint8),), text=np.array([IMAGE]))])
    with pytest.raises(ValueError, match="there are none"):
        model.read([])
    pixels = np.zeros((2, 2, 1), dtype=np.uint8)
    for sample, problem in (
        (megapar.MediaSample(text=np.array([5, IMAGE])), "`text` has -1 1 times, and there are 0 of image"),
        (megapar.MediaSample(images=(pixels,), text=np.array([5])), "`text` has -1 0 times, and there are 1 of image"),
        (megapar.MediaSample(text=np.array([-3])), "`text` holds -3"),
        (megapar.MediaSample(text=[1, 2]), "`text` is no numpy array"),  # type: ignore[arg-type]
        (megapar.MediaSample(), "one has nothing to read"),
        (megapar.MediaSample((pixels.astype(np.float32),), text=np.array([IMAGE])), "an image float32"),
        (megapar.MediaSample((pixels.repeat(3, 2),), text=np.array([IMAGE])), r"give uint8 \[height, width, 1\]"),
        (megapar.MediaSample(text=np.array([99999])), "hold 99999"),
    ):
        with pytest.raises(ValueError, match=problem):
            model.read([sample])
    model.close()
    model = Model(tiny_config(media["data.prefix"], **media | WRITES))
    for clip in (
        np.zeros(9, dtype=np.int16),
        np.zeros((3, 3), np.float32),
        np.zeros(0, np.float32),
        np.full(9, np.nan, np.float32),
    ):
        with pytest.raises(ValueError, match=r"a sound .*; give float32"):
            model.read([megapar.MediaSample(clips=(clip,), text=np.array([AUDIO]))])
    model.close()
