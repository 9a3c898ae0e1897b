"""What encoders of images and sound compute, beside other people's code and by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank, spectrogram

from megapar.config.keys import changed
from megapar.config.schema import ModelConfig, TrainConfig
from megapar.data.media.batches import lay_out, patches, windows
from megapar.data.media.samples import AUDIO, IMAGE, MediaSample
from megapar.models.media import LEAST_POWER, LogMel, mel_bands, sinusoids
from megapar.part import ModelPart
from tests.media.samples import WRITES
from tests.parallel.layouts import verify_config


def log_mel(model: ModelConfig) -> LogMel:
    config = changed(verify_config("x", ["tp2"], **WRITES), {"parallel.tp": 1})
    return LogMel(ModelPart(config, 0).context, model)


def test_bands_are_those_of_transformers() -> None:
    theirs = mel_filter_bank(257, 40, 0.0, 4000.0, 8000, norm=None, mel_scale="htk")
    assert np.abs(mel_bands(512, 40, 8000).numpy() - theirs).max() < 1e-9  # a Hz less in a corner changes 1e-2
    assert (theirs.sum(0) > 0).all()


def test_features_are_those_of_transformers() -> None:
    """fp64; theirs are of one long waveform, ours of the windows of its tokens."""
    model = changed(TrainConfig(), {"model.audio.rate": 8000, "model.audio.mels": 40, "model.audio.layers": 1}).model
    wave = np.random.default_rng(0).standard_normal(3000) * 0.1
    read = windows(wave.astype(np.float32), model.audio)
    ours = log_mel(model).spectrogram(torch.from_numpy(read.values.astype(np.float64))).view(-1, 40)
    padded = np.zeros((len(ours) - 1) * 80 + 200)
    padded[:3000] = wave.astype(np.float32)
    window = torch.hann_window(200, dtype=torch.float64).numpy()
    bands = mel_filter_bank(257, 40, 0.0, 4000.0, 8000, norm=None, mel_scale="htk")
    theirs = spectrogram(
        padded, window, 200, 80, fft_length=512, power=2.0, center=False, mel_filters=bands, log_mel="log10",
        mel_floor=LEAST_POWER, dtype=np.dtype(np.float64),
    )  # fmt: skip
    assert np.abs(ours.numpy() - theirs.T).max() < 4e-6  # they keep their spectrum in complex64


def test_a_quiet_recording_has_the_features_of_a_loud_one() -> None:
    """Otherwise what a linear layer gets is nearly all how loud the recording is, and nothing is learned of speech."""
    model = changed(TrainConfig(), {"model.audio.rate": 8000, "model.audio.mels": 32, "model.audio.layers": 1}).model
    waves = torch.randn(3, model.audio.samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loud, quiet = log_mel(model)(waves / 4), log_mel(model)(waves / 100)
    assert (loud - quiet).abs().max() < 1e-3
    assert loud.mean(1).abs().max() < 1e-9 and (loud.var(1, correction=0) - 1).abs().max() < 1e-3
    assert torch.isfinite(log_mel(model)(torch.zeros_like(waves))).all()


def test_waveforms_have_a_gradient() -> None:
    model = changed(TrainConfig(), {"model.audio.rate": 1000, "model.audio.mels": 4, "model.audio.layers": 1}).model
    waves = torch.randn(2, model.audio.samples, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_mel(model), waves)


def test_patches_are_read_row_by_row() -> None:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    read = patches(image, 2)
    assert read.places.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    for patch, (row, column) in zip(read.values, read.places, strict=True):
        expected = image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert (patch == expected.reshape(-1)).all()


@pytest.mark.parametrize("samples", [1, 79, 80, 319, 320, 321, 1000])
def test_every_sample_of_a_sound_is_read(samples: int) -> None:
    audio = changed(TrainConfig(), {"model.audio.rate": 8000}).model.audio  # frames of 200, a hop of 80, 4 a token
    wave = np.arange(1, samples + 1, dtype=np.float32)
    read = windows(wave, audio)
    assert len(read.values) == len(read.places) == audio.tokens(samples) == -(-samples // 320)
    for at, values in enumerate(read.values):
        part = np.zeros(440, dtype=np.float32)
        there = wave[320 * at : 320 * at + 440]
        part[: len(there)] = there
        assert (values == part).all()


def test_places_by_sines() -> None:
    found = sinusoids(torch.tensor([[3.0, 5.0]], dtype=torch.float64), 8)[0]
    for coordinate, part in zip((3.0, 5.0), found.view(2, 4), strict=True):
        expected = [np.sin(coordinate), np.sin(coordinate / 100), np.cos(coordinate), np.cos(coordinate / 100)]
        assert np.allclose(part.numpy(), expected, atol=1e-12)


def test_tokens_stand_where_the_text_says() -> None:
    values: dict[str, Any] = {"model.image.layers": 1, "model.image.patch": 2, "model.audio.layers": 1}
    model = changed(TrainConfig(), values | {"model.audio.rate": 8000}).model
    images = tuple(np.full((2, 2 * n, 3), n, dtype=np.uint8) for n in (2, 1))
    sample = MediaSample(images, (np.zeros(700, dtype=np.float32),), np.zeros(0), np.zeros(0), -1)
    laid = lay_out(model, sample, np.array([7, IMAGE, AUDIO, 8, IMAGE, 9]))
    assert laid.ids.tolist() == [7, 0, 0, 0, 0, 0, 8, 0, 9]
    assert laid.kinds.tolist() == [0, 1, 1, 2, 2, 2, 0, 1, 0]
    assert laid.ends.tolist() == [1, 3, 6, 7, 8, 9]
