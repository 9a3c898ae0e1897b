"""Choosing the next token from logits."""

import numpy as np

from megapar.config.run_schema import SampleConfig


def choose(logits: np.ndarray, sample: SampleConfig, position: int) -> int:
    """The token for a position: logits [V] -> id.

    Temperature first, then top-k, then top-p on what is left (Holtzman et al. 2020): the likeliest tokens until their
    probability is at least top_p. Of equally likely tokens the one with the smaller id counts as likelier.
    """
    if sample.temperature == 0.0:
        return int(logits.argmax())
    scaled = (logits.astype(np.float64) - logits.max()) / sample.temperature  # at most 0, however cold it is
    probability = np.exp(scaled)
    if sample.top_k or sample.top_p < 1.0:
        likeliest_first = np.argsort(-scaled, kind="stable")
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
