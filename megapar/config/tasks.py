"""What the tasks that come with megapar need of a model and of samples: for refusals before anything is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Needs:
    """about: what the task does. model: values that keys of the model may have. source: samples that it reads, where
    windows of a text won't do. reference: it has a frozen model beside, by default the weights of a run's start."""

    about: str
    model: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    source: str | None = None
    reference: bool = False


_NEXT = {"causal": (True,), "output": ("lm",)}
TASKS = {
    "lm": Needs("predicts the next token", _NEXT),
    "sft": Needs("predicts the next token", _NEXT, "instructions"),
    "dpo": Needs("predicts the next token", _NEXT, "preferences", reference=True),
    "masked_lm": Needs("looks at both sides of a hidden token", {"causal": (False,), "output": ("mlm", "lm")}),
    "classify": Needs("scores classes", {"output": ("classes",)}, "labelled"),
}
