"""The keys of `megapar bench kernels` and `megapar bench overlap`."""

from dataclasses import dataclass
from typing import Literal

from megapar.config.keys import group, option
from megapar.config.schema import KernelsConfig


@dataclass(frozen=True)
class BenchKernelsConfig:
    """`megapar bench kernels`: time kernels beside those of other libraries."""

    kernel: list[str] | None = option(None, "kernels to run; default: all")
    provider: list[str] | None = option(
        None,
        "megapar, torch, flash_attn, liger_kernel, torch_flash, torch_cudnn, torch_fp32; default: ours and torch's",
    )
    mode: list[str] = option(["forward", "backward", "full"], "passes to time; full: forward and backward together")
    shape: list[str] | None = option(
        None, "models whose layers' shapes to take: llama-8b, gpt2, demo; default: the sweep's, a small one on a CPU"
    )
    tokens: list[int] | None = option(None, "lengths of the one sample, the x axis; default: the sweep's")
    sweep: Literal["short", "full"] = option(
        "short", "short: one shape, four lengths, about a minute on a CPU; full: every shape, six lengths"
    )
    dtype: Literal["bf16", "fp16", "fp32"] | None = option(None, "dtype of all tensors; default: the model's own")
    device: Literal["auto", "cpu", "cuda"] = option("auto", "auto: cuda where a GPU is visible")
    kernels: KernelsConfig = group(KernelsConfig, "kernels.backend=interpret runs ours in the interpreter, marked so")
    targets: list[str] = option(["sm_90"], "without a GPU: compile ours for these and read the machine code")
    out: str | None = option(
        None,
        "folder for bench.csv, bench.md and the plots; default: runs/DATE-TIME-bench",
        verbatim=True,
        path=True,
        identity=False,
    )


@dataclass(frozen=True)
class BenchOverlapConfig:
    """`megapar bench overlap`: what overlapped communication hides, on ranks of this machine over a paced loopback."""

    subject: list[str] = option(
        ["layer", "step", "dp", "pp"],
        "what to time: layer and step of tensor parallelism, dp: gradient reduction, pp: transfers of 1F1B",
    )
    rate: list[float] = option([1.0], "Gbit/s that a connection between two ranks is paced to; 0: not paced")
    pairs: int = option(9, "alternating repetitions, whose medians count")
    ranks: int = option(2, "tensor-parallel ranks of layer and step")
    tokens: int = option(2048, "tokens of a layer")
    hidden: int = option(1024, "width of a layer's input and output")
    ffn: int = option(1536, "inner width of a layer, over all ranks")
    sequence_parallel: bool = option(True, "split the layer's input and output over its ranks")
    pieces: int | None = option(None, "pieces of chunked; default: what its table says for the shape, at least 2")
    out: str | None = option(
        None,
        "folder for bench.csv, bench.md and the pictures; default: runs/DATE-TIME-bench",
        verbatim=True,
        path=True,
        identity=False,
    )
