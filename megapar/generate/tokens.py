"""Text generation: the next token chosen from the last position's logits, one at a time, in any layout."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megapar.config.errors import UserError
from megapar.config.schema import SampleConfig
from megapar.parallel.collectives import all_gather
from megapar.parallel.context import StageContext
from megapar.pipeline.executor import Executor
from megapar.pipeline.stage import Batch, Tensors
from megapar.schedule.lower import forward_only, lower

_NOT_FINITE = -1  # sent instead of a token


def generate_tokens(
    executor: Executor,
    context: StageContext,
    prompt: Sequence[int],
    sample: SampleConfig,
    *,
    context_length: int,
    vocab_size: int | None = None,
    end_of_text: int | None = None,
    on_token: Callable[[int], None] = lambda token: None,
) -> list[int]:
    """The tokens that the model writes after `prompt`, up to `sample.max_tokens` or `end_of_text`, which is left out.

    executor, context: of a rank's part of the model, whose last stage returns {"logits": [T, V_r]}
    prompt: at least one token id
    context_length: positions that the model was trained on; longer texts are truncated to their last ones
    vocab_size: of the tokenizer; the model may have more rows, which are never chosen
    on_token: called with each token as soon as it is chosen, on every rank

    Collective over all ranks, which all return the same. The draw for a position depends on (sample.seed, position)
    alone, so layouts differ only where rounding moves a probability across a draw. Every token costs a forward pass
    over the whole context: there is no key/value cache yet. Raises UserError on all ranks for logits that are not
    finite.
    """
    assert prompt, "nothing to continue"
    tokens = [int(token) for token in prompt]
    for _ in range(sample.max_tokens):
        token = _next_token(executor, context, tokens, sample, context_length, vocab_size)
        if token == end_of_text:
            break
        tokens.append(token)
        on_token(token)
    return tokens[len(prompt) :]


def choose(logits: np.ndarray, sample: SampleConfig, position: int) -> int:
    """The token for a position: logits [V] -> id.

    Temperature first, then top-k, then top-p on what is left (Holtzman et al. 2020): the likeliest tokens until their
    probability is at least top_p. Of equally likely tokens the one with the smaller id counts as likelier.
    """
    if sample.temperature == 0.0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sample.temperature
    likeliest_first = np.argsort(-scaled, kind="stable")
    probability = np.exp(scaled - scaled.max())
    if sample.top_k:
        probability[likeliest_first[sample.top_k :]] = 0.0
    if sample.top_p < 1.0:
        before = np.cumsum(probability[likeliest_first])
        before = np.concatenate([[0.0], before[:-1] / before[-1]])
        probability[likeliest_first[before >= sample.top_p]] = 0.0
    # In the order of ids: the order by likelihood could differ between layouts by rounding.
    cumulative = np.cumsum(probability)
    draw = cumulative[-1] * uniform(sample.seed, position)
    return min(int(np.searchsorted(cumulative, draw, side="right")), int(np.flatnonzero(probability)[-1]))


def uniform(seed: int, position: int) -> float:
    """The draw in [0, 1) for a position of the text, from a counter-based generator."""
    return float(np.random.Generator(np.random.Philox(key=seed % (1 << 128), counter=position)).random())


def _next_token(
    executor: Executor,
    context: StageContext,
    tokens: list[int],
    sample: SampleConfig,
    context_length: int,
    vocab_size: int | None,
) -> int:
    mesh, placement = context.mesh, context.placement
    seen = tokens[-context_length:]
    last = len(seen) - 1

    def head(outputs: Tensors, batch: Batch) -> Tensor:
        return _whole_vocabulary(outputs["logits"][last], context)

    schedule = lower(forward_only(placement, 1), len(placement), 1)
    logits = executor.run(schedule, [_batch(seen, context)], head)
    mesh.timeline.forget()
    chosen = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    source = mesh.first_rank(pp=placement[-1])
    if mesh.rank == source:
        values = logits[0][:vocab_size].cpu().numpy()
        chosen[0] = choose(values, sample, len(tokens)) if np.isfinite(values).all() else _NOT_FINITE
    if mesh.world_size > 1:
        dist.broadcast(chosen, source, group=mesh["world"].group)
    token = int(chosen)
    if token == _NOT_FINITE:
        raise UserError(
            f"the model's logits for token {len(tokens)} are not finite: training diverged; use an earlier checkpoint"
        )
    return token


def _batch(seen: list[int], context: StageContext) -> Batch:
    """One sample. Under sequence parallelism it is padded on the right, which causal attention never looks at."""
    share = context.tp.size if context.splits_tokens else 1
    ids = seen + [0] * (-len(seen) % share)
    device = context.device
    return {
        "ids": torch.tensor([ids], dtype=torch.int64, device=device),
        "samples": torch.zeros(1, dtype=torch.int64, device=device),
        "step": torch.tensor(0),
    }


def _whole_vocabulary(logits: Tensor, context: StageContext) -> Tensor:
    """[V_r], this rank's part of the vocabulary, -> [V], at least fp32. Shards differ by a row at most: padded."""
    tp = context.tp
    sizes = all_gather(torch.tensor([len(logits)], device=logits.device), tp).tolist()
    padded = logits.new_zeros(1, max(sizes), dtype=context.wide_dtype)
    padded[0, : len(logits)] = logits
    rows = all_gather(padded, tp)
    return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])
