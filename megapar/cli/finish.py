"""From a composed configuration to one that ranks can read, before a process is started: for `train` and `verify`."""

import os
import time
from pathlib import Path
from typing import Any, TypeVar

from megapar.cli.output import refuse_bad_out, say
from megapar.config import ConfigError, TrainConfig, VerifyConfig, check, resolve
from megapar.config.check import check_optimizer_name
from megapar.config.derive import in_one_process
from megapar.config.errors import UserError
from megapar.config.keys import changed, value_of
from megapar.config.model import least_bytes
from megapar.config.tasks import has_reference, refuse_other_samples
from megapar.kernels import INTERPRET
from megapar.launch.machine import memory_bytes, num_gpus

T = TypeVar("T", TrainConfig, VerifyConfig)


LOOKS = 10  # at run.slots_file


def slots(config: TrainConfig) -> int | None:
    """How many ranks of an elastic run may be there, by `run.slots_file`. Raises ConfigError."""
    path = config.run.slots_file
    if path is None:
        return None
    if not config.run.elastic:
        raise ConfigError("run.slots_file", path, "has no effect here; it is used only with run.elastic=true")
    for look in range(LOOKS):
        try:
            return int(Path(path).read_text(encoding="ascii"))
        except (OSError, ValueError) as error:
            if look < LOOKS - 1:  # somebody may be writing it
                time.sleep(0.05)
                continue
            reason = getattr(error, "strerror", None) or "not a whole number"
            raise ConfigError("run.slots_file", path, f"{reason}; write how many ranks may run into it") from None
    return None


def finish(config: T, world_size: int | None = None) -> T:
    """The config as the ranks get it: everything derived and checked, the data prepared.

    world_size: ranks that are running already. Raises UserError before anything was started or written but data files.
    """
    gpus = num_gpus()
    draft = check_early(config, gpus, world_size)
    if world_size is None and config.kernels.backend != "interpret":
        from megapar.launch.local import start_fork_server

        start_fork_server(draft.parallel.layout.world)  # imports torch while we prepare the data
    from megapar.data.source import Split, find_source

    config = _with_tokenizer_of_weights(config)
    weights = config.checkpoint.weights and os.path.abspath(config.checkpoint.weights)
    if config.task.reference is None and has_reference(config):
        config = changed(config, {"task.reference": weights})
    if config.model.lora.rank and config.model.lora.base is None:
        config = changed(config, {"model.lora.base": weights})
    refuse_missing("task.reference", config.task.reference)
    refuse_missing("model.lora.base", config.model.lora.base)
    source = find_source(config.data.source)
    prepared = source.prepare(config.data, say)
    refuse_other_samples(config, prepared.samples)
    if config.reward is not None:  # behind the source: an experiment's stands beside that
        from megapar.tasks.reward import find_reward

        find_reward(config.reward)
    sizes: dict[str, Any] = {name: getattr(prepared, name) for name in ("vocab_size", "max_token", "classes")}
    sizes["media"] = prepared.media and prepared.media(config.model)
    config = resolve(config, **sizes, num_gpus=gpus, world_size=world_size, slots=slots(config))
    check(config, num_gpus=gpus, world_size=world_size)
    if config.task.sample_tokens and prepared.tokenizer_path is None:
        problem = "these token files came without a tokenizer, so nothing can be written; use 0"
        raise ConfigError("task.sample_tokens", config.task.sample_tokens, problem)
    if prepared.tokenizer_path is not None and (config.task.sample_tokens or config.train.eval_every):
        from megapar.data.tokenizer import open_tokenizer

        open_tokenizer(prepared.tokenizer_path)  # the ranks will: refuses where a library is missing
    if config.task.sample_tokens:
        refuse_bad_prompt(config.task.sample_prompt)
    config = changed(config, {"data.prefix": str(prepared.prefix)})
    splits: tuple[Split, ...] = ("train", "valid") if config.train.eval_every else ("train",)
    for split in splits:
        samples = source.open(config, split)  # refuses too few samples
        if left_out := getattr(samples, "left_out", ""):
            say(f"data: {split}: {left_out}")
    return config


def refuse_missing(key: str, folder: str | None, remedy: str = "") -> None:
    """Raise ConfigError where a key names no weights. remedy: what to do instead of naming others by that key."""
    if folder is None:
        return
    from megapar.checkpoint import find_checkpoint
    from megapar.checkpoint.hf.folder import is_hf_folder

    try:
        if not is_hf_folder(folder):
            find_checkpoint(folder)
    except UserError as error:
        problem = str(error).removeprefix(f"{folder}: ")
        raise ConfigError(key, folder, f"{problem.partition(';')[0]}; {remedy}" if remedy else problem) from None


def refuse_missing_base(trained: TrainConfig) -> None:
    """Raise ConfigError where the weights are gone that a run's adapters stand beside."""
    remedy = "if it has moved, give checkpoint.base=FOLDER"
    refuse_missing("model.lora.base", trained.model.lora.base, remedy)


def _with_tokenizer_of_weights(config: T) -> T:
    """Weights to go on from come with a tokenizer: what would train another one takes that."""
    data, weights = config.data, config.checkpoint.weights
    if weights is None or data.tokenizer != "bpe" or data.prefix is not None:
        return config
    from megapar.convert import tokenizer_of
    from megapar.data.indexed import has_token_files

    if has_token_files(data.path) or (path := tokenizer_of(weights)) is None:
        return config
    say(f"data: the tokenizer of the weights, {path}")
    return changed(config, {"data.tokenizer": str(path)})


def refuse_bad_prompt(prompt: str) -> None:
    """Raise ConfigError for a prompt that can't be encoded, as after a byte of the command line that is no UTF-8."""
    from megapar.data.tokenizer import check_unicode

    try:
        check_unicode(prompt)
    except UserError as error:
        raise ConfigError("task.sample_prompt", ascii(prompt), str(error)) from None


def refuse_too_large(config: TrainConfig, share: float = 1.0) -> None:
    """Raise UserError if a run can't fit into memory, by an estimate of what it holds at least.

    share: of the ranks that are on this machine
    """
    least, device = least_bytes(config), config.train.device
    need = least / config.parallel.layout.world if device == "cuda" else least * share
    have = memory_bytes(device)
    if have is None or need <= have:
        return
    where = "each GPU" if device == "cuda" else "this machine"
    keys = ("model.layers", "model.hidden", "train.seq_length", "train.micro_batch_size")
    sizes = ", ".join(f"{key}={value_of(config, key)}" for key in keys)
    raise UserError(
        f"{sizes}: needs at least {need / 1e9:,.0f} GB of {where}, which has {have / 1e9:,.1f} GB; "
        "make one of them smaller, or use more devices"
    )


def check_early(config: T, gpus: int, world_size: int | None = None) -> T:
    """Derive and check what can be without the data: refuses in a moment. Returns the config so far."""
    share = 1.0 if world_size is None else int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) / world_size
    check_optimizer_name(config.optim.name)
    alone = in_one_process(config, gpus)
    if alone.train.device == "cpu":
        refuse_too_large(alone, share)  # before layouts are tried, each of which takes a look at every layer
    draft = resolve(config, num_gpus=gpus, world_size=world_size, slots=slots(config))
    refuse_too_large(draft, share)
    check(draft, num_gpus=gpus, world_size=world_size)
    if config.model.module is not None:
        from megapar.part import find_builder

        find_builder(config.model.module)
    refuse_bad_out(config.out, config.run.dir)
    from megapar.train.sinks import sink_kinds

    for sink in sink_kinds():
        if sink.wanted(config):
            sink.refuse(config)
    return draft


def rank_environment(backend: str) -> dict[str, str]:
    """What a rank's environment must say before it imports the kernels."""
    return {INTERPRET: "1"} if backend == "interpret" else {}
