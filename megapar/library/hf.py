"""A model with the weights of a Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch

from megapar.checkpoint.hf.family import to_model
from megapar.checkpoint.hf.folder import HfWeights, logical_shapes, model_keys
from megapar.library.model import Model
from megapar.library.settings import settings
from megapar.parallel.boxes import owned_boxes


def from_hf(
    folder: str | Path,
    *,
    layout: str = "single",
    dtype: str = "fp32",
    device: str | None = None,
    seq_length: int | None = None,
) -> Model:
    """A model with the weights of a folder that transformers has saved: config.json and safetensors.

    `megapar.from_hf(dir)(tokens)` gives the logits that transformers gives. In a layout of several ranks each reads its
    own slices alone. seq_length: as of `build`; default: the most positions that config.json names.

    Raises UserError, one line, for a model_type that we don't know or can't compute, remote code, pickled weights, and
    a tensor that is missing, one too many or of another shape.
    """
    keys, length = model_keys(Path(folder))
    choices: dict[str, Any] = {"layout": layout, "dtype": dtype, "device": device, "seq_length": seq_length or length}
    config = settings(to_model(keys), {}, **choices, seed=None, schedule="1f1b", chunks=None)
    weights = HfWeights(Path(folder), logical_shapes(config))
    model = Model(config, initial=False)
    with torch.no_grad():
        for owned in owned_boxes(model.part.buffers):
            weights.read(owned.record.name, owned.box, owned.view(model.part.buffers.params))
    model.read_bytes = weights.read_bytes
    return model
