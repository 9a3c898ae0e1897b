"""Images and sound: encoders that read pixels and waveforms, and the places of their tokens among those of a text.

A micro-batch has all its patches, or windows of a waveform, in one row, whatever samples they are of: T' of them, of
this rank t'. Images and sounds do not see each other there. One without any leaves its encoder unused.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megapar.config.policy import projector_linears
from megapar.config.schema import ModelConfig
from megapar.config.stacks import MEDIA, medium_features
from megapar.kernels.swiglu import gelu
from megapar.models.layer import SITE_EMBEDDING, HiddenDropout, norm
from megapar.models.linear import column, row
from megapar.models.tokens import Tokens
from megapar.parallel.collectives import gather_into_region
from megapar.parallel.context import StageContext
from megapar.parallel.layers import ReplicatedEmbedding, ReplicatedLinear
from megapar.parallel.record import Normal
from megapar.pipeline.stage import Batch

LEAST_POWER = 1e-6  # of a mel band, before its logarithm: what rounding to 16 bits leaves of silence


class MediumEmbedding(nn.Module):
    """What is read of a medium, [T', ...], to x [t', H']: a linear layer of its features, and sines and cosines of
    where each token stands.

    model: that of the medium's stack; whole: the model that it is a part of
    """

    def __init__(self, context: StageContext, model: ModelConfig, whole: ModelConfig, name: str) -> None:
        super().__init__()
        inputs = medium_features(whole, name)
        self.context, self.name = context, name
        self.features: nn.Module = Pixels() if name == "image" else LogMel(context, whole)
        init = Normal(inputs**-0.5)
        self.linear = ReplicatedLinear(context, f"{name}.embedding", inputs, model.hidden, init=init)
        self.dropout = HiddenDropout(context, model.dropout, name, 0, SITE_EMBEDDING)

    def forward(self, batch: Batch, tokens: Tokens) -> Tensor:
        """`NAME` [T', ...]: what is read, and `NAME_places` int64 [T', coordinates] of a batch."""
        features = self.features(batch[self.name][tokens.local]).to(self.context.dtype)
        x_tH = self.linear(features)
        places = batch[f"{self.name}_places"][tokens.local].to(self.context.wide_dtype)
        return self.dropout(x_tH + sinusoids(places, x_tH.shape[1]).to(x_tH.dtype), tokens)


class Pixels(nn.Module):
    """Patches [t', pixels * channels]: uint8 to -1..1; others, such as those that have a gradient, as they are."""

    def forward(self, patches: Tensor) -> Tensor:
        return patches.float() / 127.5 - 1.0 if patches.dtype == torch.uint8 else patches


class LogMel(nn.Module):
    """Waveforms [t', samples of a token], -1..1, to log-mel features [t', frames * mels].

    Of every frame, behind a Hann window, the logarithm of the power in mel bands, from 0 Hz to half the sampling rate.
    Those of a token have mean 0 and variance 1, however loud the recording is: speech moves them by less than a tenth
    of where they stand, which a linear layer would hardly see (as Kumar et al. 2023, Dual PatchNorm, of images).
    """

    def __init__(self, context: StageContext, model: ModelConfig) -> None:
        super().__init__()
        self.context, self.audio = context, model.audio
        # Frames are padded with zeros to twice their length, as the lowest bands are narrower than 1 / length.
        self.points = 1 << (2 * self.audio.window - 1).bit_length()
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(self, waves: Tensor) -> Tensor:
        features = self.spectrogram(waves).flatten(1)
        return nn.functional.layer_norm(features, features.shape[1:])

    def spectrogram(self, waves: Tensor) -> Tensor:
        """log10 of the power [t', frames, mels]."""
        window, bands = self._made()
        frames = waves.to(window.dtype).unfold(1, self.audio.window, self.audio.hop) * window
        spectrum = torch.view_as_real(torch.fft.rfft(frames, self.points))
        power = spectrum.square().sum(-1) @ bands
        return power.clamp(min=LEAST_POWER).log10()

    def _made(self) -> tuple[Tensor, Tensor]:
        """The window [samples of a frame] and the bands [frequencies, mels], in the wide dtype."""
        if self._tables is None:
            audio, dtype, device = self.audio, self.context.wide_dtype, self.context.device
            bands = mel_bands(self.points, audio.mels, audio.rate).to(device, dtype)
            self._tables = torch.hann_window(audio.window, dtype=dtype, device=device), bands
        return self._tables


class Projector(nn.Module):
    """The norm behind a medium's encoder, and an MLP to the trunk's width: x [t', H'] -> [t', H] (Liu et al. 2023)."""

    def __init__(self, context: StageContext, model: ModelConfig, hidden: int, name: str) -> None:
        super().__init__()
        linears = projector_linears(model, hidden)
        self.norm = norm(context, model, f"{name}.norm")
        self.up = column(context, model, linears["project.up"], f"{name}.projector.")
        self.down = row(context, model, linears["project.down"], f"{name}.projector.")

    def forward(self, x_tH: Tensor) -> Tensor:
        return self.down(gelu(self.up(self.norm(x_tH))))


class Places(nn.Module):
    """x [t, H] of a text with the tokens of media where these stand, and an embedding of what each is."""

    def __init__(self, context: StageContext, model: ModelConfig) -> None:
        super().__init__()
        self.context = context
        init = Normal(model.init_std)
        self.modalities = ReplicatedEmbedding(context, "modalities", 1 + len(MEDIA), model.hidden, init=init)

    def forward(self, x_tH: Tensor, tokens: Tokens, media: Mapping[str, Tensor]) -> Tensor:
        """media: x of each medium, [t', H]."""
        if tokens.kinds is None or tokens.media is None:
            return x_tH + self.modalities(torch.zeros_like(tokens.local_places))
        kinds, which = (one.reshape(-1)[tokens.local] for one in (tokens.kinds, tokens.media))
        for number, name in enumerate(MEDIA, 1):
            if name in media:
                x_TH = media[name]
                if self.context.splits_tokens:  # a token's place may be another rank's
                    x_TH = gather_into_region(x_TH, self.context.tp)
                here = kinds == number
                x_tH = torch.where(here.unsqueeze(1), x_TH.index_select(0, torch.where(here, which, 0)), x_tH)
        return x_tH + self.modalities(kinds)


def sinusoids(places: Tensor, width: int) -> Tensor:
    """[t, coordinates] -> [t, width]: an equal share for each coordinate, its sines and then its cosines (Vaswani et
    al. 2017, section 3.5)."""
    each = width // places.shape[1] // 2
    steps = torch.arange(each, dtype=places.dtype, device=places.device)
    angles = places.unsqueeze(2) * torch.exp(steps * (-math.log(10000.0) / each))
    return torch.cat([angles.sin(), angles.cos()], 2).flatten(1)


def mel_bands(points: int, mels: int, rate: int) -> Tensor:
    """[points // 2 + 1, mels] fp64: triangles over the frequencies of so many points, whose corners are as far
    apart on the mel scale, 2595 log10(1 + Hz / 700) (Davis & Mermelstein 1980; O'Shaughnessy 1987)."""
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.arange(points // 2 + 1, dtype=torch.float64) * rate / points
    low, middle, high = (corners[first : first + mels] for first in range(3))
    up = (frequencies.unsqueeze(1) - low) / (middle - low)
    down = (high - frequencies.unsqueeze(1)) / (high - middle)
    return torch.minimum(up, down).clamp(min=0)
