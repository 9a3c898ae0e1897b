"""The 1.1B model: tokens/s, MFU, memory, idle time, kernels by time; beside it a plain torch model of the same sizes;
with CUDA graphs and without."""

import gc
import math
import time
from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from experiments.gpu.models import Values, configuration, model_rates, sizes_of, timed_steps
from experiments.gpu.plain import PlainStep
from experiments.gpu.profiled import Kernels, busy_of, by_name, idle_of, kernels_of
from experiments.gpu.run import Run, deterministic
from experiments.gpu.section import Section
from megapar.parallel import buffers
from megapar.parallel.record import Normal, ParameterRecord, Shard
from megapar.trace.spans import BUSY
from megapar.train.trainer import Step, Trainer

MFU, IDLE, BESIDE_PLAIN = 0.50, 0.05, 1.15
KERNELS = 15  # that are shown by time
SPANS_WITHIN = 0.03  # of the profiler's sum of kernels
# How far gpu_idle may be off a profile, in shares of a step. It counts all of an interval at whose end the queue was
# empty; and not the 1 or 2 us between any two kernels of a full one, of which a step has some thousands.
IDLE_ABOVE, IDLE_BELOW = 0.03, 0.03
PAUSE_S = 0.1  # of the host, in which the GPU has nothing to do
WORTH_S = 30  # with less time left CUDA graphs are left out


def profile(run: Run) -> None:
    one = sizes_of(run)
    seconds = run.attempt("megapar 1.1B", megapar, run, one)
    freed(run)
    plain = run.attempt("plain torch 1.1B", plain_torch, run, one)
    if seconds and plain:
        note = "plain torch keeps weights, gradients and moments in bf16: less work"
        run.rate("megapar beside plain torch", plain / seconds, "x", BESIDE_PLAIN, note)
    freed(run)
    if run.left() > WORTH_S:
        run.attempt("CUDA graphs", graphs_beside_eager, run, one)
    else:
        run.skip("CUDA graphs", "no time left")  # card-only


def freed(run: Run) -> None:
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()  # card-only
        torch.cuda.reset_peak_memory_stats()  # card-only


def memory(run: Run, name: str) -> None:
    run.rate(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 1e9 if run.cuda else math.nan, "GB")


def trainer_of(run: Run, one: SimpleNamespace, micro: int, count: int, graphs: str = "off") -> Trainer:
    deterministic()
    values: Values = {f"model.{name}": getattr(one, name) for name in ("layers", "hidden", "heads", "kv_heads", "ffn")}
    values |= {"model.vocab_size": one.vocab, "train.seq_length": one.length, "train.micro_batch_size": micro}
    values |= {"train.global_batch_size": micro * count, "train.dtype": "bf16", "train.steps": 50}
    values |= {"train.cuda_graphs": graphs}
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
    idle_beside(run, "a step", kernels, last[0])
    kernels = kernels_of(run, lambda: last.append(trainer.step(len(losses) + 2, lambda: pause(run))))
    idle_beside(run, f"a step with a pause of {1e3 * PAUSE_S:.0f} ms", kernels, last[1])
    return seconds


def pause(run: Run) -> None:
    run.sync()
    time.sleep(PAUSE_S)


def idle_beside(run: Run, name: str, kernels: Kernels, step: Step) -> None:
    """gpu_idle, as a run's metrics have it, beside a profile of the same step."""
    profiled, own = idle_of(kernels, step.spans, step.seconds)
    note = f"{own:.1%}, {profiled:.1%} by the profiler"
    run.share(f"megapar, {name}: gpu_idle above the profiler's", own - profiled, IDLE_ABOVE, note)
    run.share(f"megapar, {name}: gpu_idle below the profiler's", profiled - own, IDLE_BELOW, note)


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


def graphs_beside_eager(run: Run, one: SimpleNamespace) -> None:
    """Micro-batches of one sample, all but a step's last from graphs or none of them; on a CPU none."""
    count, seconds = one.micro * one.count, {}
    for graphs in ("off", "on"):
        trainer = trainer_of(run, one, 1, count, graphs)
        seconds[graphs] = timed_steps(run, trainer.step)
        captured = 0 if trainer.graphs is None else trainer.graphs.captured
        name = f"megapar, micro-batches of one sample, CUDA graphs {graphs}"
        run.rate(f"{name}: tokens", one.tokens / seconds[graphs], "tokens/s", note=f"{captured} graphs captured")
        trainer.close()
        del trainer
        freed(run)
    note = f"{count} micro-batches a step, the last of them eager"
    run.rate("CUDA graphs beside eager", seconds["off"] / seconds["on"], "x", 1.0, note)


def plain_torch(run: Run, one: SimpleNamespace) -> float:
    torch.use_deterministic_algorithms(False)
    step = PlainStep(run, one)
    seconds = timed_steps(run, step)
    run.row("plain torch: loss is finite", math.isfinite(step.loss), step.loss, "nats")
    model_rates(run, "plain torch", one, seconds)
    memory(run, "plain torch")
    return seconds


SECTION = Section("profile", wave=4, seconds=100, run=profile)
