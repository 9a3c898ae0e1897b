"""Looks inside every `interpret.every` steps: tensors of sites, and how large the residual stream and its gradient are
behind every layer, in RUN/interpret/."""

import json
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megapar.config.schema import TrainConfig
from megapar.config.sites import residual_sites
from megapar.files import write_atomic
from megapar.interpret.capture import GRADIENT, Capture
from megapar.train.hooks.hook import Hook
from megapar.train.trainer import Step

FOLDER = "interpret"  # in a run's directory


class Interpret(Hook):
    order = 15

    @classmethod
    def wanted(cls, config: TrainConfig) -> bool:
        return bool(config.interpret.capture or config.interpret.statistics)

    def start(self) -> None:
        self.seen: Capture | None = None
        options = self.loop.config.interpret
        self.residual = residual_sites(self.loop.config.model) if options.statistics else []
        self.sites = list(dict.fromkeys([*(options.capture or []), *self.residual]))

    def before(self, step: int) -> None:
        if step == 1 or step % self.loop.config.interpret.every == 0:
            gradients, key = self.loop.config.interpret.statistics, "interpret.capture"
            # What a policy's step learns from it has written through the same places.
            seen = Capture(self.loop.trainer, self.sites, gradients=gradients, written=False, key=key)
            self.seen = seen.__enter__()

    def after(self, step: int, done: Step) -> None:
        if self.seen is None:
            return
        self.seen.__exit__(None, None, None)
        self.loop.settle()
        kept = {name: self.seen[name].cpu().contiguous() for name in self.loop.config.interpret.capture or []}
        sizes = {name: self._sizes(self.seen, name) for name in self.residual}
        self.seen = None
        if self.loop.writer is None:
            return
        folder = self.loop.folder / FOLDER
        folder.mkdir(exist_ok=True)
        if kept:
            whole = folder / f".step-{step:08}.safetensors"
            save_file(kept, whole)
            whole.replace(folder / f"step-{step:08}.safetensors")
        if sizes:
            write_atomic(folder / f"step-{step:08}.json", json.dumps({"step": step, "sites": sizes}, indent=1) + "\n")

    def _sizes(self, seen: Capture, name: str) -> dict[str, dict[str, float]]:
        return {"value": _sizes_of(seen[name]), "gradient": _sizes_of(seen[name + GRADIENT])}


def _sizes_of(x: Tensor) -> dict[str, float]:
    """mean, rms: over all elements; max: the largest magnitude; zeros: the share of elements that are 0"""
    wide = x.double()
    figures: dict[str, Any] = {
        "mean": wide.mean(),
        "rms": wide.square().mean().sqrt(),
        "max": wide.abs().max(),
        "zeros": (wide == 0).double().mean(),
    }
    return {name: float(figure) for name, figure in figures.items() if torch.isfinite(figure)}


HOOK = Interpret
