"""A text as a model reads it, as one HTML page: nothing is fetched, and everything can be hovered over."""

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reading:
    """title, facts: lines at the top
    tokens: of the text, as text
    rows: names of what the lens looked at; said: of each row and token the likeliest next tokens, as text
    chances: fp64 [rows, S, top], of each; entropy: fp64 [rows, S], in nats. Empty for a model without logits
    weights: of attention, [layers, N, S, S]
    """

    title: str
    facts: str
    tokens: Sequence[str]
    rows: Sequence[str]
    said: Sequence[Sequence[Sequence[str]]]
    chances: Tensor
    entropy: Tensor
    weights: Tensor


def page_of(reading: Reading) -> str:
    """Weights of attention are rounded to 1/255."""
    layers, heads = reading.weights.shape[:2]
    quantised = (reading.weights.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    words = sorted({word for row in reading.said for cell in row for word in cell})
    number = {word: place for place, word in enumerate(words)}
    data: dict[str, Any] = {
        "tokens": list(reading.tokens),
        "layers": layers,
        "heads": heads,
        "rows": list(reading.rows),
        "words": words,
        "said": [[[number[word] for word in cell] for cell in row] for row in reading.said],
        "chances": [[[round(one, 4) for one in cell] for cell in row] for row in reading.chances.tolist()],
        "entropy": [[round(one, 3) for one in row] for row in reading.entropy.tolist()],
        "weights": base64.b64encode(quantised.numpy().tobytes()).decode(),
    }
    content = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    filled = {"TITLE": escape(reading.title), "FACTS": escape(reading.facts), "DATA": content}
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    parts = template.split("%%")  # odd ones are names
    return "".join(filled[part] if place % 2 else part for place, part in enumerate(parts))
