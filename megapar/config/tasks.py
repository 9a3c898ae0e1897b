"""What the tasks that come with megapar need of a model and of samples: for refusals before anything is imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megapar.config.errors import ConfigError
from megapar.config.found import modules_of
from megapar.config.schema import TaskConfig, TrainConfig
from megapar.config.stacks import TEXT, media

WINDOWS = "tokens"  # the source of windows of a text, and of samples for tasks that name no other


@dataclass(frozen=True)
class Needs:
    """What a task needs.

    about: what it does. model: values that keys of the model may have. samples: the source whose samples it reads.
    keys: those of `task` that it alone uses. reference: it has a frozen model beside, by default the weights of a
    run's start. encoder: its model has one beside a decoder
    """

    about: str
    model: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    samples: str = WINDOWS
    keys: tuple[str, ...] = ()
    reference: bool = False
    encoder: bool = False


_NEXT = {"causal": (True,), "output": ("lm",)}
_OF_MEDIA = "modalities", "modality_dropout"
TASKS = {
    "lm": Needs("predicts the next token", _NEXT),
    "sft": Needs("predicts the next token", _NEXT, "instructions"),
    "dpo": Needs("predicts the next token", _NEXT, "preferences", ("beta", "reference"), reference=True),
    "masked_lm": Needs(
        "looks at both sides of a hidden token", {"causal": (False,), "output": ("mlm", "lm")}, keys=("mask_share",)
    ),
    "classify": Needs("scores classes", {"output": ("classes",)}, "labelled"),
    "multimodal_classify": Needs("scores classes", {"output": ("classes",)}, "media", _OF_MEDIA),
    "multimodal_lm": Needs("predicts the next token", _NEXT, "media", _OF_MEDIA),
    "seq2seq": Needs("writes the target of a source that an encoder reads", {}, "paired", encoder=True),
}


def check_task(config: TrainConfig) -> None:
    """Refuse an unknown task, a model that can't learn it, other samples, and keys of other tasks."""
    name = config.task.name
    if name not in (tasks := modules_of("megapar.tasks.kinds")):
        raise ConfigError("task.name", name, f"no such task; there are {', '.join(sorted(tasks))}")
    if (known := TASKS.get(name)) is None:
        return
    if known.encoder != (config.model.encoder.layers > 0):
        remedy = "use a model with an encoder" if known.encoder else "use task=seq2seq, or a model without an encoder"
        raise ConfigError(
            "model.encoder.layers", config.model.encoder.layers, f"task.name={name} {known.about}; {remedy}"
        )
    if config.task.modalities is not None:
        there = [*media(config.model), TEXT]
        if wrong := [one for one in config.task.modalities if one not in there]:
            raise ConfigError("task.modalities", wrong[0], f"the model reads {', '.join(there)}; name some of these")
        if not config.task.modalities:
            raise ConfigError("task.modalities", [], f"nothing would be read; name some of {', '.join(there)}")
    for key, allowed in known.model.items():
        if (value := getattr(config.model, key)) not in allowed:
            needed = " or ".join(f"model.{key}={str(one).lower()}" for one in allowed)
            raise ConfigError(f"model.{key}", value, f"task.name={name} {known.about}, which needs {needed}")
    for other, needs in TASKS.items():
        for key in needs.keys:
            if key not in known.keys and (value := getattr(config.task, key)) != getattr(TaskConfig(), key):
                raise ConfigError(f"task.{key}", value, f"has no effect here; it is used only with task={other}")
    if known.samples != WINDOWS and config.data.source == WINDOWS:
        problem = f"task.name={name} reads other samples; use {known.samples}, as task={name} does"
        raise ConfigError("data.source", config.data.source, problem)


def refuse_other_samples(config: TrainConfig, samples: str) -> None:
    """Raise ConfigError where prepared data has samples for another task."""
    known = TASKS.get(config.task.name)
    if known is not None and known.samples != samples:
        fitting = [name for name, needs in TASKS.items() if needs.samples == samples]
        problem = f"data.source={config.data.source} makes {samples} of it, and task.name={config.task.name} reads"
        remedy = f"give other data, or use task={' or '.join(fitting)}" if fitting else "give other data"
        raise ConfigError("data.path", config.data.path, f"{problem} {known.samples}; {remedy}")
