"""What a model would say behind every layer, by its own head (the logit lens; Belrose et al. 2023, section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megapar.config.errors import UserError
from megapar.interpret.walk import part_of
from megapar.models.head import Head
from megapar.parallel.collectives import all_gather, all_reduce


@dataclass(frozen=True)
class Lens:
    """tokens int64 [layers, samples, S, top]: the likeliest next ones behind every layer; probabilities fp64, of each;
    entropy fp64 [layers, samples, S], in nats"""

    tokens: Tensor
    probabilities: Tensor
    entropy: Tensor


def logit_lens(model: Any, streams: Sequence[Tensor], top: int = 5) -> Lens:
    """streams: the residual stream behind layers, [samples, S, H] each, as `capture` gives it for `layers.N`.

    They are taken in the model's dtype. Collective; the same on every rank. Raises UserError for a model without
    logits, for streams of other shapes, and for values that are not finite.
    """
    part = part_of(model, "logit_lens")
    if not part.config.model.has_logits:
        raise UserError(f"logit_lens: model.output={part.config.model.output} has no logits; use a run with output=lm")
    assert part.config.model.vocab_size is not None
    hidden, shapes = part.config.model.hidden, {tuple(x.shape) for x in streams}
    if len(shapes) != 1 or any(len(shape) != 3 or shape[2] != hidden for shape in shapes):
        given = ", ".join(str(list(x.shape)) for x in streams) or "none"
        raise UserError(f"logit_lens: streams {given}; give [samples, S, {hidden}] each, alike, as capture gives them")
    if top < 1:
        raise UserError(f"logit_lens: top={top}; give at least 1")
    top, dtype = min(top, part.config.model.vocab_size), part.context.dtype
    head: Any = getattr(part.stages.get(part.schedule.stages - 1), "head", None)
    shape = len(streams), *streams[0].shape[:2]
    found = torch.zeros(*shape, 2 * top + 1, dtype=torch.float64, device=part.mesh.device)
    if head is not None:
        with torch.no_grad(), part.context.whole_tokens():
            for into, x in zip(found, streams, strict=True):
                into.copy_(_said(head, x.flatten(0, 1).to(part.mesh.device, dtype), top).view(*shape[1:], -1))
    if head is None or not part.mesh.first_along("weights", "samples", "tokens", None):
        found.zero_()  # one rank says it
    found = all_reduce(found, part.mesh["world"])
    if not found.isfinite().all():
        raise UserError("logit_lens: streams, or what the model's head makes of them, are not finite")
    return Lens(found[..., :top].round().long(), found[..., top:-1], found[..., -1])


def _said(head: Head, x: Tensor, top: int) -> Tensor:
    """x [T, H] -> [T, top tokens, top probabilities, entropy], fp64, the same on all ranks that share the head."""
    tp = head.context.tp
    logits = head(x).double()
    width = min(top, logits.shape[1])
    best = logits.new_full((len(x), 2 * top), -torch.inf)
    values, tokens = logits.topk(width, 1)
    best[:, :width], best[:, top : top + width] = values, (tokens + head.first_id).double()
    scale = all_gather(torch.logsumexp(logits, 1).unsqueeze(0), tp).logsumexp(0)
    chances = (logits - scale.unsqueeze(1)).exp()
    entropy = all_reduce(-(chances * (logits - scale.unsqueeze(1))).nan_to_num().sum(1), tp)
    values, tokens = (part.transpose(0, 1).flatten(1) for part in all_gather(best.unsqueeze(0), tp).split(top, 2))
    chosen = values.topk(top, 1)
    return torch.cat(
        [tokens.gather(1, chosen.indices), (chosen.values - scale.unsqueeze(1)).exp(), entropy.unsqueeze(1)], 1
    )
