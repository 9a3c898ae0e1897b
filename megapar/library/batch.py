"""A batch of token ids as the stages read it: checked, and dealt out to data-parallel ranks and micro-batches."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megapar.config.schema import ModelConfig, TrainConfig
from megapar.config.stacks import media
from megapar.data.media.batches import Rows, lay_out
from megapar.data.media.samples import AUDIO, IMAGE, MediaSample
from megapar.mesh import Axis
from megapar.parallel.context import StageContext
from megapar.pipeline.stage import Batch

IGNORED = -100  # the label of a token that does not count, as in torch


def check_ids(ids: Tensor, config: TrainConfig, device: torch.device, name: str = "ids") -> None:
    """Raise ValueError, one line, unless ids [B, S] can be read by the model. Labels may be IGNORED."""
    model, length = config.model, config.train.seq_length
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2 or not ids.numel():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"{name}: expects int64 [B, S] with at least one token, got {got}")
    if ids.device.type != device.type:
        raise ValueError(f"{name}: are on {ids.device}, and the model is on {device}; move them there")
    if model.position == "learned" and ids.shape[1] > length:
        problem = f"{ids.shape[1]} tokens per sample, and the model has learned {length} positions"
        raise ValueError(f"{name}: {problem}; build it with seq_length={ids.shape[1]}")
    assert model.vocab_size is not None
    real = ids[ids != IGNORED] if name == "labels" else ids
    if real.numel() and not 0 <= (low := int(real.min())) <= (high := int(real.max())) < model.vocab_size:
        bad = low if low < 0 else high
        raise ValueError(
            f"{name}: hold {bad}, and the model has vocab_size={model.vocab_size}; ids are 0 to {model.vocab_size - 1}"
        )


def whole(ids: Tensor, step: int) -> Batch:
    """All samples as one micro-batch. step: the number of the pass, which dropout goes by, 0 without it."""
    samples = torch.arange(len(ids), device=ids.device)
    return {"ids": ids.long().contiguous(), "samples": samples, "step": torch.tensor(step)}


def deal(
    ids: Tensor,
    labels: Tensor,
    step: int,
    peers: Axis,
    microbatches: int,
    source: Tensor | None = None,
    source_mask: Tensor | None = None,
) -> list[Batch]:
    """This rank's micro-batches of a global batch: samples go out micro-batch by micro-batch, rank after rank.

    ids, labels [B, S], source, source_mask [B, L], the same on every rank. Raises ValueError unless B divides.
    """
    if labels.shape != ids.shape:
        raise ValueError(f"labels: {list(labels.shape)}, and ids are {list(ids.shape)}; give a label for every token")
    if microbatches < 1 or len(ids) % (microbatches * peers.size):
        product = f"{microbatches} micro-batches" + (f" on each of {peers.size} dp ranks" if peers.size > 1 else "")
        raise ValueError(f"ids: {len(ids)} samples don't divide into {product}; change one of the numbers")
    size = len(ids) // (microbatches * peers.size)
    counted = (labels != IGNORED).sum().double()
    if not counted:
        raise ValueError(f"labels: all are {IGNORED}, so there is nothing to learn")
    batch = whole(ids, step) | {"labels": labels.long().contiguous()}
    dealt = []
    for m in range(microbatches):
        first = (m * peers.size + peers.index) * size
        part = {name: batch[name][first : first + size] for name in ("ids", "samples", "labels")}
        sources = (None if given is None else given[first : first + size] for given in (source, source_mask))
        part |= source_inputs(part["ids"], *sources)
        dealt.append(part | {"step": batch["step"], "tokens": counted})
    return dealt


def side_inputs(ids: Tensor, attention_mask: Tensor | None, token_types: Tensor | None) -> Batch:
    """What a batch has besides, see `Model.forward`. Raises ValueError for other shapes, and for a mask with holes."""
    found = {}
    for name, given in (("attention_mask", attention_mask), ("token_types", token_types)):
        if given is not None and given.shape != ids.shape:
            raise ValueError(f"{name}: {list(given.shape)}, and ids are {list(ids.shape)}; give one for every token")
    if token_types is not None:
        found["types"] = token_types.long()
    if attention_mask is not None:
        found["starts"] = starts_of_mask(attention_mask)
        found["lengths"] = attention_mask.shape[1] - attention_mask.flip(1).int().argmax(1)
    return found


def source_inputs(
    ids: Tensor, source: Tensor | None, source_mask: Tensor | None, attention_mask: Tensor | None = None
) -> Batch:
    """What an encoder reads, see `Model.forward`. Raises ValueError for other shapes, and for a mask with holes."""
    if source is None:
        return {}
    if len(source) != len(ids):
        raise ValueError(f"source: {len(source)} samples, and ids are {len(ids)}; give one for every sample")
    found = {"source": source.long().contiguous()}
    if source_mask is None and attention_mask is None:
        return found
    masks = {"starts": (attention_mask, ids), "source_starts": (source_mask, source)}
    for name, (mask, tokens) in masks.items():
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"a mask {list(mask.shape)}, and its tokens are {list(tokens.shape)}; give one for each")
        found[name] = starts_of_mask(torch.ones_like(tokens) if mask is None else mask)
    return found


def media_inputs(
    config: TrainConfig, samples: Sequence[MediaSample], device: torch.device, context: StageContext
) -> Batch:
    """Samples of images, sound and text as one micro-batch, without its step, see `Model.read`. Raises ValueError."""
    model = config.model
    if not samples:
        raise ValueError("samples: there are none; give at least one")
    for sample in samples:
        _check_sample(sample, model)
    granule = context.tp.size if context.splits_tokens else 1
    laid, rows = [lay_out(model, sample, sample.text) for sample in samples], Rows(model, media(model), granule)
    length = -(-max(map(len, laid)) // granule) * granule
    arrays = {name: np.zeros((len(laid), length), dtype=np.int64) for name in ("ids", "kinds", "media", "mask")}
    for at, one in enumerate(laid):
        parts = {"ids": one.ids, "kinds": one.kinds, "media": rows.add(at, one), "mask": np.ones_like(one.ids)}
        for name, part in parts.items():
            arrays[name][at, : len(one)] = part
    tensors = {name: torch.from_numpy(array).to(device) for name, array in (arrays | rows.arrays()).items()}
    mask = tensors.pop("mask")
    check_ids(tensors["ids"], config, device)
    return tensors | {
        "samples": torch.arange(len(laid), device=device),
        "starts": starts_of_mask(mask),
        "lengths": mask.sum(1),
    }


def _check_sample(sample: MediaSample, model: ModelConfig) -> None:
    """Raise ValueError, one line, unless the model can read a sample."""
    text = sample.text
    if not isinstance(text, np.ndarray) or text.ndim != 1 or text.dtype != np.int64:
        raise ValueError("samples: `text` is no numpy array of int64 [n]; give token ids, with -1 for each image")
    if not len(text):
        raise ValueError("samples: one has nothing to read; give `text`, with -1 for each image and -2 for each sound")
    for name, mark in (("image", IMAGE), ("audio", AUDIO)):
        found = sample.of(name)
        if found and name not in media(model):
            raise ValueError(f"samples: one has {name}, and the model has no encoder of it (model.{name}.layers)")
        if len(found) != (named := int((text == mark).sum())):
            raise ValueError(f"samples: `text` has {mark} {named} times, and there are {len(found)} of {name}")
    if (low := int(text.min())) < AUDIO:
        raise ValueError(f"samples: `text` holds {low}; below 0 are -1 for an image and -2 for a sound")
    channels, patch = model.image.channels, model.image.patch
    for image in sample.images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
            got = f"{image.dtype} {list(image.shape)}"
            raise ValueError(f"samples: an image {got}; give uint8 [height, width, {channels}] (model.image.channels)")
        if not image.size or any(size % patch for size in image.shape[:2]):
            raise ValueError(f"samples: an image {list(image.shape)}, and patches are {patch} x {patch} pixels")
    for clip in sample.clips:
        if clip.dtype != np.float32 or clip.ndim != 1 or not len(clip) or not np.isfinite(clip).all():
            got = f"{clip.dtype} {list(clip.shape)}"
            raise ValueError(f"samples: a sound {got}; give float32 [n], finite, in -1..1 at {model.audio.rate} Hz")


def starts_of_mask(mask: Tensor) -> Tensor:
    """[B, S] of ones for tokens and zeros for padding -> int32 [3 B + 1], where sequences begin, some of them empty:
    padding, tokens, padding of every sample."""
    ones = mask.bool()
    count, length = ones.sum(1), mask.shape[1]
    first = torch.where(count > 0, ones.int().argmax(1), 0)
    places = torch.arange(length, device=mask.device)
    run = (places >= first.unsqueeze(1)) & (places < (first + count).unsqueeze(1))
    if not torch.equal(run, ones):
        raise ValueError("attention_mask: has holes; the tokens of a sample must be together, padding on either side")
    begins = torch.arange(len(mask), device=mask.device) * length
    starts = torch.stack([begins, begins + first, begins + first + count], 1).flatten()
    return torch.cat([starts, starts.new_tensor([mask.numel()])]).int()
