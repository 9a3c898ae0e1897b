"""The Trainer on this device against the same one on a CPU in fp64, and against itself."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.gpu.compare import distance, same_bits
from experiments.gpu.models import Values, configuration, recipes
from experiments.gpu.run import Run, deterministic
from experiments.gpu.section import Section
from megapar.config.schema import TrainConfig
from megapar.kernels import use_backend
from megapar.train.trainer import Trainer


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    norms: list[float]
    weights: Tensor  # fp32 masters of all, one after another
    trainer: Trainer


@dataclass(frozen=True)
class Near:
    """How near to fp64: relative errors of the first loss, every loss, the first gradient norm, the last weights."""

    first: float
    later: float
    norm: float
    weights: float


# torch in fp32 on a CPU is 5e-10, 2e-7, 1e-8 and 2e-5 away after the 20 steps, in bf16 8e-6, 2e-4, 9e-4 and 1e-2.
FP32, BF16 = Near(2e-6, 1e-4, 1e-4, 1e-2), Near(1e-2, 1e-2, 3e-2, 1e-1)


def trained(config: TrainConfig, steps: int, trainer: Trainer | None = None, first: int = 1) -> Trained:
    """Steps first..steps."""
    trainer = trainer or Trainer(config, 0)
    done = [trainer.step(step) for step in range(first, steps + 1)]
    masters = trainer.optimizer.masters
    weights = torch.cat([x.flatten() for x in masters]) if isinstance(masters, list) else masters.clone()
    return Trained([s.loss for s in done], [s.result.grad_norm for s in done], weights, trainer)


def training(run: Run) -> None:
    deterministic()
    path = run.out / "work" / "reference.pt"
    if not path.exists():
        run.skip("section", "`reference` left nothing to compare with")  # card-only
        return  # card-only
    truth = torch.load(path, weights_only=True)
    for check in (repeated, bf16, with_dropout, resumed, in_torch, graphed):
        run.attempt(check.__name__, check, run, truth)
    for kind in ("selective", "full"):
        run.attempt(f"recompute {kind}", recomputed, run, kind)


def config_of(run: Run, recipe: str, dtype: str, values: Values | None = None) -> TrainConfig:
    options = {"train.dtype": dtype, "kernels.backend": run.backend} | (values or {})
    return configuration(run, recipes(run.cuda)[recipe][0] | options)


def away(found: list[float], exact: list[float]) -> list[float]:
    """Relative errors; inf for what is no number."""
    pairs = zip(found, exact, strict=True)
    return [abs(a - b) / abs(b) if math.isfinite(a) else math.inf for a, b in pairs]


def against(run: Run, recipe: str, dtype: str, name: str, near: Near, truth: Any) -> Trained:
    done, exact = trained(config_of(run, recipe, dtype), recipes(run.cuda)[recipe][1]), truth[recipe]
    losses = away(done.losses, exact["losses"])
    run.within(f"{name}: loss of step 1", losses[0], near.first, note=f"{done.losses[0]:.6f}")
    run.within(f"{name}: losses of {len(losses)} steps", max(losses), near.later, note=f"{done.losses[-1]:.6f}")
    norm = away(done.norms[:1], exact["norms"][:1])[0]
    run.within(f"{name}: gradient norm of step 1", norm, near.norm, near.norm / 10)
    far = distance(done.weights.cpu(), exact["weights"])
    run.within(f"{name}: weights after {len(losses)} steps", far, near.weights)
    return done


def same(run: Run, check: str, one: Trained, two: Trained) -> None:
    alike = one.losses == two.losses and same_bits([one.weights], [two.weights])
    run.row(check, alike, note="" if alike else f"losses {one.losses[-1]} and {two.losses[-1]}")


def repeated(run: Run, truth: Any) -> None:
    one = against(run, "demo", "fp32", "demo fp32", FP32, truth)
    same(run, "demo fp32 again, to the bit", one, trained(config_of(run, "demo", "fp32"), len(one.losses)))


def bf16(run: Run, truth: Any) -> None:
    against(run, "demo", "bf16", "demo bf16", BF16, truth)


def with_dropout(run: Run, truth: Any) -> None:
    """Its masks are the CPU's, or the losses are far away."""
    against(run, "gpt2", "fp32", "gpt2 style fp32, dropout", FP32, truth)


def recomputed(run: Run, kind: str) -> None:
    one, two = (trained(quick(run, {"train.recompute": choice}), 3 if run.cuda else 1) for choice in ("none", kind))
    same(run, f"recompute {kind}, to the bit", one, two)


def quick(run: Run, values: Values | None = None) -> TrainConfig:
    """The demo in bf16, in a rehearsal with one micro-batch a step."""
    base = recipes(run.cuda)["demo"][0]
    batch = {} if run.cuda else {"train.global_batch_size": base["train.micro_batch_size"]}
    return config_of(run, "demo", "bf16", batch | (values or {}))


def graphed(run: Run, truth: Any) -> None:
    """Four micro-batches a step, of which three run from CUDA graphs."""
    four = {"train.global_batch_size": 4, "train.micro_batch_size": 1}
    plain, graphs = (trained(quick(run, four | {"train.cuda_graphs": on}), 3) for on in ("off", "on"))
    same(run, "CUDA graphs, to the bit", plain, graphs)
    captured = 0 if graphs.trainer.graphs is None else graphs.trainer.graphs.captured
    run.row("CUDA graphs are captured once", captured == (4 if run.cuda else 0), captured, "graphs")


def in_torch(run: Run, truth: Any) -> None:
    """fp64, which has no Triton form."""
    config, exact = config_of(run, "demo", "fp64", {"kernels.backend": "torch"}), truth["demo"]
    done = trained(config, len(exact["losses"]))
    use_backend(run.backend)
    run.within("demo fp64 in torch: losses", max(away(done.losses, exact["losses"])), 1e-12)
    run.within("demo fp64 in torch: gradient norms", max(away(done.norms, exact["norms"])), 1e-9)


def resumed(run: Run, truth: Any) -> None:
    from megapar.checkpoint import load, save

    config = quick(run)
    trainer, last = trained(config, 1).trainer, 3 if run.cuda else 2
    saved = save(run.out / "work" / "checkpoints", trainer.optimizer, config, 1)
    straight = trained(config, last, trainer, 2)
    other = Trainer(config, 0)
    load(saved, other.optimizer, config)
    same(run, f"save, load, {last - 1} steps, to the bit", straight, trained(config, last, other, 2))


SECTION = Section(
    "training", wave=2, seconds=110, run=training, needs=("reference",),
    environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
)  # fmt: skip
