"""Models that are trained here, as resolved configurations: what the command line would make of them."""

import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np

from experiments.gpu.run import Run
from megapar.config.check import check
from megapar.config.derive import resolve
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.data.indexed import write_indexed

Values = dict[str, Any]
PEAK = 989.4e12  # FLOP/s of an H100 SXM and of an H200 in dense bf16, by their data sheets

# fmt: off
DEMO: Values = {
    "model.layers": 4, "model.hidden": 128, "model.heads": 4, "model.kv_heads": 2, "model.ffn": 384,
    "model.vocab_size": 1024, "train.seq_length": 64, "train.micro_batch_size": 8, "train.global_batch_size": 16,
    "optim.lr": 4e-3, "optim.warmup_steps": 10, "train.steps": 20,
}
TINY: Values = {
    "model.layers": 1, "model.hidden": 32, "model.heads": 2, "model.kv_heads": 1, "model.ffn": 48,
    "model.vocab_size": 61, "train.seq_length": 8, "train.micro_batch_size": 2, "train.global_batch_size": 4,
    "optim.lr": 4e-3, "optim.warmup_steps": 1, "train.steps": 2,
}
GPT2: Values = {
    "model.norm": "layernorm", "model.position": "learned", "model.activation": "gelu", "model.bias": True,
    "model.tied": True, "model.dropout": 0.1, "model.kv_heads": None,
}
BILLION = SimpleNamespace(
    layers=20, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=5632, vocab=32768, length=4096, micro=2, count=4
)
SMALL = SimpleNamespace(
    layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=48, vocab=61, length=8, micro=1, count=2
)
# fmt: on


def recipes(cuda: bool) -> dict[str, tuple[Values, int]]:
    """(what makes the model and its run, steps) of what is trained against fp64."""
    base = DEMO if cuda else TINY
    return {"demo": (base, base["train.steps"]), "gpt2": (base | GPT2, 5 if cuda else 2)}


def configuration(run: Run, values: Values, tokens: int = 60_000) -> TrainConfig:
    """A resolved configuration over a token file of its vocabulary."""
    vocabulary = values["model.vocab_size"]
    folder = run.out / "work" / run.section
    prefix = str(folder / str(vocabulary))
    if not (folder / f"{vocabulary}.bin").exists():
        folder.mkdir(parents=True, exist_ok=True)
        words = np.random.Philox(key=7).random_raw(tokens) >> np.uint64(11)  # of a counter: the same in every numpy
        ids = (vocabulary * (words / 2.0**53) ** 3).astype(np.uint16)  # rare ones and frequent ones
        write_indexed(prefix, np.array_split(ids, 40), np.uint16)
    given = {"data.path": prefix, "data.prefix": prefix, "train.device": run.device}
    config = resolve(changed(TrainConfig(), given | values), num_gpus=int(run.cuda))
    check(config)
    return config


def sizes_of(run: Run) -> SimpleNamespace:
    """The 1.1B model's, with `flops` of a token and the `tokens` of a step; a tiny one's in a rehearsal.

    Forward and backward: 6 FLOPs for a weight of a matrix, and of attention two products over half the square, thrice.
    """
    one = BILLION if run.cuda else SMALL
    layer = one.hidden * one.head_dim * (2 * one.heads + 2 * one.kv_heads) + 3 * one.hidden * one.ffn
    weights = one.layers * layer + one.hidden * one.vocab
    flops = 6 * weights + 6 * one.layers * one.heads * one.head_dim * one.length
    return SimpleNamespace(**vars(one), flops=flops, tokens=one.micro * one.count * one.length)


def timed_steps(run: Run, step: Callable[[int], object], warm: int = 2, timed: int = 3) -> float:
    """Median seconds of a step; steps are numbered from 1."""
    warm, timed = (warm, timed) if run.cuda else (1, 1)
    seconds = []
    for number in range(1, warm + timed + 1):
        start = time.perf_counter()
        step(number)
        run.sync()
        seconds.append(time.perf_counter() - start)
    return median(seconds[warm:])


def model_rates(run: Run, name: str, one: SimpleNamespace, seconds: float, floor: float | None = None) -> None:
    rate = one.tokens / seconds
    run.rate(f"{name}: tokens", rate, "tokens/s")
    run.rate(f"{name}: MFU", rate * one.flops / PEAK, "of 989 TFLOP/s", floor)
