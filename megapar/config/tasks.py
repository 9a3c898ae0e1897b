"""What the tasks that come with megapar need of a model and of samples: for refusals before anything is imported."""

from collections.abc import Callable, Mapping
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
    keys: those of `task` that not every task uses. reference: whether it has a frozen model beside, by default the
    weights of a run's start. encoder: its model has one beside a decoder
    """

    about: str
    model: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    samples: str = WINDOWS
    keys: tuple[str, ...] = ()
    reference: Callable[[TaskConfig], bool] = lambda task: False
    encoder: bool = False


_NEXT = {"causal": (True,), "output": ("lm",)}
_OF_MEDIA = "modalities", "modality_dropout"
TASKS = {
    "lm": Needs("predicts the next token", _NEXT),
    "sft": Needs("predicts the next token", _NEXT, "instructions"),
    "dpo": Needs("predicts the next token", _NEXT, "preferences", ("beta", "reference"), lambda task: True),
    "policy": Needs(
        "learns what it has written, with the same probabilities",
        _NEXT | {"dropout": (0.0,)},
        "prompts",
        ("group", "max_tokens", "temperature", "clip", "kl", "write_batch", "reference"),
        lambda task: task.kl > 0,
    ),
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
    for key in {key: None for needs in TASKS.values() for key in needs.keys}:
        if key not in known.keys and (value := getattr(config.task, key)) != getattr(TaskConfig(), key):
            users = " or ".join(f"task={other}" for other, needs in TASKS.items() if key in needs.keys)
            raise ConfigError(f"task.{key}", value, f"has no effect here; it is used only with {users}")
    if name == "policy":
        _check_policy(config)
    elif config.reward is not None:
        raise ConfigError("reward", config.reward, "has no effect here; it is used only with task=policy")
    if known.samples != WINDOWS and config.data.source == WINDOWS:
        problem = f"task.name={name} reads other samples; use {known.samples}, as task={name} does"
        raise ConfigError("data.source", config.data.source, problem)


def _check_policy(config: TrainConfig) -> None:
    """Refuse a policy without a reward, a batch of broken groups, and a reference that nothing looks at."""
    task, batch = config.task, config.train.global_batch_size
    if config.reward is None:
        problem = "a policy learns from a function of yours; give PACKAGE:FUNCTION, such as my_reward:reward"
        raise ConfigError("reward", None, problem)
    if batch % task.group:
        problem = f"completions are in groups of task.group={task.group}; use a multiple of it"
        raise ConfigError("train.global_batch_size", batch, problem)
    if task.reference is not None and not has_reference(config):
        raise ConfigError("task.reference", task.reference, "has no effect here; it is used only with task.kl above 0")
    if config.data.too_long == "truncate":
        raise ConfigError("data.too_long", "truncate", "a prompt without its end asks for nothing; use refuse or skip")


def has_reference(config: TrainConfig) -> bool:
    """Whether a frozen model stands beside the one that learns."""
    known = TASKS.get(config.task.name)
    return known is not None and known.reference(config.task)


def refuse_other_samples(config: TrainConfig, samples: str) -> None:
    """Raise ConfigError where prepared data has samples for another task."""
    known = TASKS.get(config.task.name)
    if known is not None and known.samples != samples:
        fitting = [name for name, needs in TASKS.items() if needs.samples == samples]
        problem = f"data.source={config.data.source} makes {samples} of it, and task.name={config.task.name} reads"
        remedy = f"give other data, or use task={' or '.join(fitting)}" if fitting else "give other data"
        raise ConfigError("data.path", config.data.path, f"{problem} {known.samples}; {remedy}")
