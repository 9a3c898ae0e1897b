"""Every configuration key, its type, its default and a one-line description.

`conf/*.yaml` holds compositions of these groups; the dataclasses are the one place where a key exists. `None` means
"derived": `megapar.config.resolve` fills it in before a run starts, so a worker never sees one it has to guess.
"""

from dataclasses import dataclass, make_dataclass
from datetime import timedelta
from typing import Any, Literal

from megapar.config.faults import FaultConfig
from megapar.config.keys import group, option
from megapar.config.layout import AXES, Layout
from megapar.config.model_schema import ModelConfig
from megapar.config.run_sections import CheckpointConfig, TrainRunConfig
from megapar.config.task_schema import TaskConfig

# A key for every axis. Of type Any, as the axes are data: the number of ranks, None if it is derived.
AxisSizes: Any = make_dataclass(
    "AxisSizes",
    [
        (
            kind.name,
            int | None if kind.derived else int,
            option(None if kind.derived else 1, kind.help, at_least=1, also=kind.also),
        )
        for kind in AXES.values()
    ],
    frozen=True,
)


@dataclass(frozen=True)
class EncoderParallelConfig:
    """What is another number for an encoder in front of a decoder."""

    tp: int | None = option(None, "tensor-parallel ranks of an encoder; must be those of parallel.tp", at_least=1)


@dataclass(frozen=True)
class ParallelConfig(AxisSizes):
    """How many ranks share what."""

    auto: bool = option(False, "choose tp, pp and dp for `devices` ranks")
    sequence_parallel: bool = option(False, "split activations between the tensor-parallel regions over tp as well")
    tp_overlap: Literal["auto", "serial", "chunked", "symmetric"] = option(
        "auto",
        "how a tensor-parallel matmul and its collective run: serial, chunked, symmetric (fused), or by a table",
    )
    zero: Literal[0, 1] = option(0, "1: shard the optimizer state over dp (ZeRO-1)")
    grad_compression: Literal["none", "bf16", "int8_ef", "powersgd"] = option(
        "none", "reduce gradients over dp in fewer bytes, and not exactly: bf16, int8_ef, powersgd"
    )
    powersgd_rank: int = option(4, "rank of powersgd's factors")
    check_gradients: bool = option(
        False, "refuse a parameter that some micro-batch did not use, by name; else its gradient is zero there"
    )
    bucket_size: int | None = option(
        None,
        "elements of a gradient bucket, reduced over dp as soon as it is complete; default: 1M, 40M on GPUs",
        at_least=1,
    )
    encoder: EncoderParallelConfig = group(EncoderParallelConfig, "an encoder in front of the decoder")

    @property
    def layout(self) -> Layout:
        """The layout; a size that is not derived yet counts as 1."""
        return Layout(**{name: getattr(self, name) or 1 for name in AXES})


@dataclass(frozen=True)
class PipelineConfig:
    """The pipeline schedule and the partition of layers."""

    schedule: str = option("1f1b", "order of forward and backward passes: a schedule's name, auto, or csv:PATH")
    partition: str | list[int] | dict[str, list[int]] = option(
        "uniform",
        "layers per stage: uniform; balanced: by costs; a list such as [5,3]; or {encoder: [2], decoder: [3,3]}",
    )
    chunks: int | None = option(
        None, "stages per rank; default: the schedule's own, 2 for interleaved and the V schedules, else 1", at_least=1
    )
    rebalance: int = option(
        0,
        "steps after which layers move to where they are faster, by measured times, at a checkpoint; 0: never",
        at_least=0,
    )
    costs: str | None = option(
        None,
        "costs.json of an earlier run, for balanced and auto; default: estimated from floating-point operations",
        verbatim=True,
        path=True,
    )
    speed: list[float] | None = option(
        None, "relative speed of each pipeline rank's device, for balanced and auto; default: all the same"
    )
    device_memory: list[float] | None = option(
        None, "GiB of each pipeline rank's device, kept to by balanced; default: no limit"
    )
    memory_limit: float | None = option(
        None, "most activations of a rank that auto may hold, in micro-batches; default: no limit", above=0
    )


@dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from."""

    path: str = option(
        "stdlib",
        "text file or folder, PREFIX of .bin/.idx token files, or stdlib (Python's own sources)",
        empty="names no data; give a file, a folder, a PREFIX of token files, or stdlib",
        verbatim=True,
        kept=True,
    )
    source: str = option(
        "tokens",
        "where samples come from: a file of megapar/data/sources/, or NAME of experiments/NAME/data.py",
        empty="names no source; leave it out for tokens",
        fixed=True,
    )
    tokenizer: str = option(
        "bpe",
        "bpe: train sentencepiece BPE on the text; bytes; or a .model, a tokenizer.json (Hugging Face's), their folder",
        verbatim=True,
        kept=True,
    )
    vocab_size: int = option(1024, "size of the tokenizer to train (bpe)", at_least=1, kept=True)
    split: float = option(
        0.05, "share of the documents held out for validation, chosen by hash", at_least=0, below=1, fixed=True
    )
    document_mask: bool = option(
        False, "documents that share a sample don't see each other, and each begins at position 0", kept=True
    )
    valid: str | None = option(
        None,
        "records to hold out: JSONL, or media as in data.path; default: data.split of those of data.path",
        verbatim=True,
        path=True,
        kept=True,
    )
    packing: bool = option(True, "several instructions in one sample, which don't see each other", fixed=True)
    too_long: Literal["refuse", "skip", "truncate"] = option(
        "refuse", "a record of more tokens than a sample: an error, left out, or cut at its end", fixed=True
    )
    on_error: Literal["refuse", "skip"] = option(
        "refuse", "source=media: a sample that can't be read or used is an error, or left out and counted", fixed=True
    )
    balance: bool = option(
        True,
        "source=media: samples of a step are put together so that micro-batches cost about the same; same samples",
        identity=False,
    )
    verify: Literal["quick", "full"] = option(
        "quick", "check of the token files at start: sizes and samples, or every byte"
    )
    prefix: str | None = option(
        None, "PREFIX of the prepared token files; default: found in the cache or made from data.path", verbatim=True
    )
    cache: str | None = option(
        None, "folder for prepared token files; default: $XDG_CACHE_HOME/megapar or ~/.cache/megapar", verbatim=True
    )


@dataclass(frozen=True)
class PartOptions:
    """What parameters of some parts of the model have of their own."""

    lr_scale: float = option(1.0, "times the learning rate; 0: the values stay as they are", at_least=0)
    weight_decay: float | None = option(None, "in place of optim.weight_decay; default: that", at_least=0)


@dataclass(frozen=True)
class OptimConfig:
    """The update rule, its learning rate over the steps, and what single parts of the model have of their own."""

    name: str = option(
        "adamw", "update rule: a file of megapar/update_rules/", kept=True, also=("optimizer", "optimizer_name")
    )
    lr: float = option(3e-4, "peak learning rate", above=0, also=("learning_rate",))
    min_lr: float = option(0.1, "final learning rate as a share of lr", at_least=0, at_most=1)
    warmup_steps: int = option(0, "steps of linear warm-up from lr / warmup_steps", at_least=0)
    schedule: Literal["cosine", "wsd", "linear", "constant"] = option(
        "cosine",
        "behind the warm-up: cosine, linear: down to min_lr * lr; wsd: so over the last decay_steps alone; constant",
        also=("lr_scheduler", "lr_scheduler_type", "lr_decay_style", "lr_schedule"),
    )
    decay_steps: int | None = option(
        None, "last steps over which wsd goes down; default: a tenth of the steps, rounded up", at_least=1
    )
    weight_decay: float = option(0.1, "decoupled weight decay of parameters with two or more dimensions", at_least=0)
    beta1: float = option(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = option(0.95, "decay of the second moment", at_least=0, below=1)
    eps: float = option(1e-8, "added to the root of the second moment", above=0)
    momentum: float = option(0.95, "decay of Muon's momentum", at_least=0, below=1)
    clip_grad: float = option(
        1.0, "bound of the global gradient norm; 0: no clipping", at_least=0, also=("max_grad_norm", "grad_clip")
    )
    groups: dict[str, PartOptions] | None = option(
        None,
        "by part of the model, the first pattern counts: {embedding: {lr_scale: 0.1}, layers.*: {weight_decay: 0}}",
        verbatim=True,
    )


@dataclass(frozen=True)
class TrainSection:
    """The loop: how long, how much at once, in which precision."""

    steps: int = option(100, "optimizer steps", at_least=1, also=("max_steps", "train_iters"))
    seq_length: int = option(
        128,
        "tokens per sample",
        at_least=1,
        fixed=True,
        also=("seq_len", "sequence_length", "block_size", "max_position_embeddings"),
    )
    source_length: int | None = option(
        None, "tokens per sample that an encoder reads; default: seq_length", at_least=1, fixed=True
    )
    image_length: int | None = option(
        None,
        "tokens per sample that an encoder of images reads, about, for estimates; default: those of the data",
        at_least=0,
    )
    audio_length: int | None = option(
        None,
        "tokens per sample that an encoder of sound reads, about, for estimates; default: those of the data",
        at_least=0,
    )
    micro_batch_size: int = option(
        4, "samples of one forward pass on one data-parallel rank", at_least=1, also=("mbs",)
    )
    global_batch_size: int = option(
        16,
        "samples per optimizer step over all ranks",
        at_least=1,
        fixed=True,
        also=("batch_size", "train_batch_size", "gbs"),
    )
    seed: int = option(
        1234, "seed of initial values, sample order and dropout", at_least=0, at_most=2**63 - 1, fixed=True
    )
    dtype: Literal["fp64", "fp32", "bf16"] = option(
        "fp32", "compute dtype; bf16 keeps fp32 master weights and gradients", kept=True, also=("precision",)
    )
    resume: Literal["auto", "never"] = option(
        "auto",
        "auto: a run.dir that holds this run goes on from its newest checkpoint; never: what is there is moved aside",
        identity=False,
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where a GPU is visible")
    eval_every: int = option(
        0, "steps between evaluations on the held-out split (also after the last step); 0: off", at_least=0
    )
    eval_samples: int = option(64, "held-out samples of one evaluation", at_least=1)
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activations recomputed in backward: none, attention only, whole layers"
    )
    cuda_graphs: Literal["off", "on"] = option(
        "off", "on: micro-batches run from CUDA graphs where nothing forbids it; same bits", identity=False
    )
    trace: list[int] | None = option(
        None,
        "[N,M]: first and last step kept in trace.json; default: the last step; none if resumed after M",
        identity=False,
    )
    timeout_s: float | None = option(
        None,
        "seconds after which a stuck collective or transfer ends the run; default: 300, 1800 on GPUs",
        at_least=1,
        at_most=30 * 24 * 3600,
    )

    @property
    def timeout(self) -> timedelta:
        """`timeout_s` of a resolved config."""
        assert self.timeout_s is not None
        return timedelta(seconds=self.timeout_s)


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["offline", "online", "disabled"] = option(
        "offline", "offline: write to run.dir/wandb; online: upload"
    )
    project: str = option("megapar", "project name", verbatim=True)
    group: str | None = option(
        None, "what runs are grouped by; default: the sweep of a sweep's points", verbatim=True, identity=False
    )


@dataclass(frozen=True)
class LoggerConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: WandbConfig = group(WandbConfig, "Weights & Biases")
    tensorboard: bool = option(False, "event files in run.dir/tensorboard (needs tensorboardX)")
    csv: bool = option(False, "tables in run.dir: steps.csv, evaluations.csv")
    progress: bool = option(True, "progress bar on a terminal", identity=False)


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation of the kernels runs."""

    backend: Literal["auto", "torch", "triton", "interpret"] = option(
        "auto", "auto: triton on a GPU, torch on a CPU; interpret: triton kernels in its interpreter"
    )
    tile_scheduler: Literal["static", "dynamic"] = option(
        "static", "tiles of Triton's matmuls: by a fixed stride, or from an atomic counter; same bits", identity=False
    )


@dataclass(frozen=True)
class InterpretSection:
    """Looking inside while a run trains."""

    capture: list[str] | None = option(
        None, "places whose tensors are written to run.dir/interpret, such as [layers.2.attention.out]", identity=False
    )
    statistics: bool = option(
        False, "mean, size and gradient of the residual stream behind each layer, in run.dir/interpret", identity=False
    )
    every: int = option(100, "steps between those that are looked at; the first is, too", at_least=1, identity=False)


@dataclass(frozen=True)
class TrainConfig:
    """`megapar train`: train a model."""

    model: ModelConfig = group(ModelConfig, "the model")
    parallel: ParallelConfig = group(ParallelConfig, "the layout")
    pipeline: PipelineConfig = group(PipelineConfig, "the pipeline")
    data: DataConfig = group(DataConfig, "the data")
    task: TaskConfig = group(TaskConfig, "the task")
    reward: str | None = option(
        None,
        "task=policy: PACKAGE:FUNCTION of (prompt, completion, record) that gives a number, importable from here",
        empty="names no function; give PACKAGE:FUNCTION",
        verbatim=True,
        kept=True,
        also=("reward_fn", "reward_function", "reward_funcs"),
    )
    optim: OptimConfig = group(OptimConfig, "the optimizer")
    train: TrainSection = group(TrainSection, "the loop")
    checkpoint: CheckpointConfig = group(CheckpointConfig, "checkpoints")
    logger: LoggerConfig = group(LoggerConfig, "loggers")
    kernels: KernelsConfig = group(KernelsConfig, "kernels")
    interpret: InterpretSection = group(InterpretSection, "looking inside")
    run: TrainRunConfig = group(TrainRunConfig, "the run directory, and what happens if something goes wrong")
    fault: FaultConfig = group(FaultConfig, "what is broken on purpose, for tests")
    devices: int | None = option(
        None, "number of ranks that parallel=auto divides; default: visible GPUs, or 1", at_least=1
    )
    out: str | None = option(
        None,
        "file for the run's summary as JSON, besides run.dir/summary.json",
        verbatim=True,
        path=True,
        identity=False,
    )


@dataclass(frozen=True)
class VerifyConfig(TrainConfig):
    """`megapar verify`: compare layouts with the one-process run."""

    layouts: list[str] | None = option(
        None, "layouts such as [tp2pp2dp2,tp4]; default: every feasible one up to 8 ranks, or as many as there are GPUs"
    )
    out: str | None = option(
        None, "file for the comparison as JSON; default: run.dir/verify.json", verbatim=True, path=True, identity=False
    )
