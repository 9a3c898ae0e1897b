"""Rotary frequencies, and how they are scaled for longer texts than a model was first trained on."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megapar.config.model_schema import ModelConfig, RopeScalingConfig
from megapar.kernels.rope import rope_frequencies, table_of


@dataclass(frozen=True)
class Rotary:
    """How q and k of a layer turn: `channels` of a head, base `theta`."""

    channels: int
    theta: float
    scaling: RopeScalingConfig = field(default_factory=RopeScalingConfig)

    @classmethod
    def of(cls, model: ModelConfig, layer: int) -> "Rotary | None":
        """That of a layer of a resolved model; None: it does not turn."""
        if model.position != "rope":
            return None
        assert model.head_dim is not None, "resolve the configuration first"
        if model.windowed(layer) and model.window_rope_theta is not None:
            return cls(model.head_dim, model.window_rope_theta)
        return cls(model.head_dim, model.rope_theta, model.rope_scaling)

    def table(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[length, channels] of `table_of`. length: of the text, which `dynamic` goes by."""
        return table_of(self.frequencies(length), length, dtype, device)

    def frequencies(self, length: int) -> Tensor:
        """Radians per position of every pair of channels, fp64 [channels / 2] on the CPU.

        linear: Chen et al. 2023, "Extending context window of large language models via positional interpolation"
        dynamic: the base grows so that the longest wave fits the text (NTK-aware scaling), from original_length on
        llama3: Llama 3.1's. Waves of more than original_length / low_freq_factor positions become `factor` times as
            long, those of less than original_length / high_freq_factor stay, and those between go over smoothly
        """
        scaling, original = self.scaling, self.scaling.original_length
        plain = rope_frequencies(self.channels, self.theta)
        match scaling.kind:
            case "none":
                return plain
            case "linear":
                return plain / scaling.factor
            case "dynamic":
                assert original is not None
                growth = scaling.factor * max(length, original) / original - (scaling.factor - 1)
                return rope_frequencies(self.channels, self.theta * growth ** (self.channels / (self.channels - 2)))
            case "llama3":
                assert original is not None
                low, high = scaling.low_freq_factor, scaling.high_freq_factor
                waves_in_text = original * plain / (2 * math.pi)
                kept = ((waves_in_text - low) / (high - low)).clamp(0.0, 1.0)
                return kept * plain + (1 - kept) * plain / scaling.factor
