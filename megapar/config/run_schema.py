"""The keys of commands that use a run and don't train it: write, talk, serve, import, export."""

from dataclasses import dataclass
from typing import Literal

from megapar.config.keys import group, option
from megapar.config.run_sections import CheckpointConfig, RunConfig
from megapar.config.schema import KernelsConfig, ParallelConfig


@dataclass(frozen=True)
class SampleConfig:
    """How the next token is chosen."""

    max_tokens: int = option(100, "tokens to write", at_least=1, also=("max_new_tokens",))
    temperature: float = option(0.8, "softmax temperature; 0: greedy", at_least=0, also=("temp",))
    top_k: int = option(0, "keep only the k likeliest tokens; 0: all", at_least=0)
    top_p: float = option(1.0, "keep the smallest set of tokens with this much probability", above=0, at_most=1)
    seed: int = option(0, "seed of the draws", at_least=0, at_most=2**63 - 1)


@dataclass(frozen=True)
class TrainedConfig(CheckpointConfig):
    """Which weights of a run are used."""

    base: str | None = option(
        None, "of a run with LoRA: its frozen weights, if they have moved", verbatim=True, path=True, identity=False
    )


@dataclass(frozen=True)
class ForwardConfig:
    """A run's model that only runs forwards, in a layout of its own."""

    parallel: ParallelConfig = group(ParallelConfig, "the layout to run in, free of the one trained in")
    kernels: KernelsConfig = group(KernelsConfig, "kernels")
    run: RunConfig = group(RunConfig, "run.dir: the run to load")
    checkpoint: TrainedConfig = group(TrainedConfig, "checkpoint.load: a checkpoint other than the run's last")
    dtype: Literal["fp64", "fp32", "bf16"] = option("fp32", "compute dtype")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where a GPU is visible")
    devices: int | None = option(None, "number of ranks that parallel=auto divides", at_least=1)


@dataclass(frozen=True)
class WriterConfig(ForwardConfig):
    """A run's model that writes."""

    sample: SampleConfig = group(SampleConfig, "sampling")


@dataclass(frozen=True)
class GenerateConfig(WriterConfig):
    """`megapar generate`: let a trained model write."""

    prompt: str = option(
        "", "text to continue, verbatim; of more tokens than train.seq_length the last are seen", verbatim=True
    )
    prompt_file: str | None = option(
        None,
        'file with a prompt a line, or .jsonl with {"prompt": TEXT} a line, instead of prompt',
        verbatim=True,
        path=True,
    )
    image: list[str] | None = option(
        None, "files of images that the model reads, where the prompt has <image>, else in front of it"
    )
    audio: list[str] | None = option(
        None, "files of sound that the model reads, where the prompt has <audio>, else in front of it"
    )
    batch_size: int = option(8, "prompts of prompt_file that are continued at a time; changes no text", at_least=1)
    chat: bool = option(False, "a prompt is a user's message, put into the tokenizer's chat template")
    out: str | None = option(
        None,
        'file to write the text to, of prompt_file {"prompt", "completion"} a line; default: the terminal',
        verbatim=True,
        path=True,
        identity=False,
    )


@dataclass(frozen=True)
class ChatConfig(WriterConfig):
    """`megapar chat`: talk to a trained model."""


@dataclass(frozen=True)
class ServeLimits:
    """What the server takes on."""

    max_batch: int = option(8, "texts that are written at a time; others wait", at_least=1)
    max_queue: int = option(64, "texts that wait at most; more are refused (429)", at_least=0)
    max_tokens: int = option(1024, "most tokens that a request may ask for", at_least=1)
    max_body: int = option(1 << 20, "bytes of a request's body at most (413)", at_least=1)


@dataclass(frozen=True)
class ServeConfig(WriterConfig):
    """`megapar serve`: answer OpenAI-style requests on 127.0.0.1. What a request leaves out is as `sample` says."""

    port: int = option(8000, "TCP port on 127.0.0.1; 0: one that is free", at_least=0, at_most=65535)
    serve: ServeLimits = group(ServeLimits, "limits")


@dataclass(frozen=True)
class ImportConfig:
    """`megapar import`: make a run directory from a Hugging Face folder."""

    hf: str | None = option(
        None, "folder with config.json and safetensors, as transformers saves them", verbatim=True, path=True
    )
    run: RunConfig = group(RunConfig, "run.dir: the directory to make")


@dataclass(frozen=True)
class ExportConfig:
    """`megapar export`: write a run's weights as a Hugging Face folder."""

    run: RunConfig = group(RunConfig, "run.dir: the run to export")
    hf: str | None = option(None, "folder to make", verbatim=True, path=True)
    checkpoint: TrainedConfig = group(TrainedConfig, "checkpoint.load: a checkpoint other than the run's last")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option("auto", "of the weights; auto: as the checkpoint has them")
    shard_gb: float = option(5.0, "most gigabytes of a file", above=0)
    adapters: bool = option(
        False, "of a run with LoRA the adapters alone, as PEFT has them; else merged into the weights"
    )
    family: str | None = option(
        None, "model_type of config.json; default: that of the folder it was imported from, or one that has this model"
    )
