"""The 1.1B model: tokens/s, MFU, memory, idle time, kernels by time; and a plain torch model of the same sizes."""

import gc
import math
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from experiments.gpu.models import Values, configuration, model_rates, sizes_of, timed_steps
from experiments.gpu.plain import PlainStep
from experiments.gpu.profiled import Kernels, busy_of, by_name, kernels_of
from experiments.gpu.run import Run, deterministic
from experiments.gpu.section import Section
from megapar.parallel import buffers
from megapar.parallel.record import Normal, ParameterRecord, Shard
from megapar.trace.spans import BUSY
from megapar.train.trainer import Step, Trainer

MFU, IDLE, BESIDE_PLAIN = 0.50, 0.05, 1.15
KERNELS = 15  # that are shown by time
SPANS_WITHIN = 0.03  # of the profiler's sum of kernels
WORTH_S = 50  # with less time left the small micro-batches are left out


def profile(run: Run) -> None:
    one = sizes_of(run)
    seconds = run.attempt("megapar 1.1B", megapar, run, one)
    freed(run)
    plain = run.attempt("plain torch 1.1B", plain_torch, run, one)
    if seconds and plain:
        note = "plain torch keeps weights, gradients and moments in bf16: less work"
        run.rate("megapar beside plain torch", plain / seconds, "x", BESIDE_PLAIN, note)


def freed(run: Run) -> None:
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()  # card-only
        torch.cuda.reset_peak_memory_stats()  # card-only


def memory(run: Run, name: str) -> None:
    run.rate(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 1e9 if run.cuda else math.nan, "GB")


def trainer_of(run: Run, one: SimpleNamespace, micro: int, count: int) -> Trainer:
    deterministic()
    values: Values = {f"model.{name}": getattr(one, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn")}
    values |= {"model.vocab_size": one.vocab, "train.seq_length": one.length, "train.micro_batch_size": micro}
    values |= {"train.global_batch_size": micro * count, "train.dtype": "bf16", "train.steps": 50}
    config = configuration(run, values | {"kernels.backend": run.backend}, 400_000 if run.cuda else 4000)
    with mock.patch.object(buffers, "fill", filled):
        return Trainer(config, 0)


def filled(record: ParameterRecord, shard: Shard, seed: int, out: Tensor) -> None:
    """Initial values made on the device: on the host a billion take minutes."""
    if isinstance(record.init, Normal):
        out.normal_(0.0, record.init.std)
    else:
        out.fill_(record.init.value)  # type: ignore[union-attr]


def megapar(run: Run, one: SimpleNamespace) -> float:
    """Seconds of a step."""
    trainer, losses, last = trainer_of(run, one, one.micro, one.count), list[float](), list[Step]()
    seconds = timed_steps(run, lambda number: losses.append(trainer.step(number).loss))
    shown = " ".join(f"{loss:.3f}" for loss in losses)
    run.row("losses are finite", all(map(math.isfinite, losses)), losses[-1], "nats", note=shown)
    model_rates(run, "megapar", one, seconds, MFU)
    memory(run, "megapar")
    kernels = kernels_of(run, lambda: last.append(trainer.step(len(losses) + 1)))
    shares(run, kernels, last[0], one.count)
    if run.cuda and run.left() > WORTH_S:
        trainer.close()  # card-only
        del trainer  # card-only
        freed(run)  # card-only
        small = trainer_of(run, one, 1, 2)  # card-only
        quick = timed_steps(run, lambda number: small.step(number))  # card-only
        run.rate("megapar: tokens, micro-batches of one sample", 2 * one.length / quick, "tokens/s")  # card-only
    return seconds


def shares(run: Run, kernels: Kernels, step: Step, count: int) -> None:
    """Where a profiled step's time went."""
    busy, span = busy_of(kernels)
    note = f"busy {1e3 * busy:.0f} of {1e3 * span:.0f} ms, profiled"
    run.share("megapar: GPU idle share of a step", 1 - busy / span, IDLE, note)
    own = sum(one.seconds for one in step.spans if one.kind in (*BUSY, "OPTIMIZER"))
    run.share("megapar: its own clock beside the profiler's", abs(own / busy - 1), SPANS_WITHIN, f"{own / busy:.3f} x")
    run.rate("megapar: kernels a micro-batch", len(kernels) / count, "launches")
    for name, milliseconds, times in by_name(kernels, KERNELS):
        note = f"{times} times, {milliseconds / busy / 1e3:.1%}"
        run.rate(f"kernel {name[:70]}", milliseconds, "ms a step", note=note if run.cuda else "")


def plain_torch(run: Run, one: SimpleNamespace) -> float:
    torch.use_deterministic_algorithms(False)
    step = PlainStep(run, one)
    seconds = timed_steps(run, step)
    run.row("plain torch: loss is finite", math.isfinite(step.loss), step.loss, "nats")
    model_rates(run, "plain torch", one, seconds)
    memory(run, "plain torch")
    return seconds


SECTION = Section("profile", wave=4, seconds=100, run=profile)
