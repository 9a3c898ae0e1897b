"""Runs that something happens to, beside the one that nothing happened to."""

import io
import json
import re
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from megapar.checkpoint import find_checkpoint, read_manifest
from megapar.cli import main
from tests.tiny import VOCABULARY

TINY = ["model.layers=2", "model.hidden=16", "model.heads=4", f"model.vocab_size={VOCABULARY}", "data.split=0.2"]
TINY += ["train.seq_length=8", "train.global_batch_size=8", "train.micro_batch_size=2", "checkpoint.every=1"]
TINY += ["logger=disabled", "optim.lr=1e-2", "task.sample_tokens=0", "run.samples_every=1"]
FIGURES = ("loss", "grad_norm", "lr", "tokens", "skipped_steps")
RESTART = re.compile(r"run: restart (\d+) of \d+")


def trajectory(folder: Path) -> list[tuple[int, list[str]]]:
    """Step, figures and hash of the samples of every row of the metrics, in the order written, each float as the
    hexadecimal of its bits."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            found.append((row["step"], [row["samples"], *(float(row[key]).hex() for key in FIGURES)]))
    return found


def final_state(folder: Path) -> tuple[int, dict[str, str]]:
    """Step and SHA-256 of every file of the newest checkpoint, which hold all tensors of weights and optimizer."""
    manifest = read_manifest(find_checkpoint(folder))
    return manifest.step, {name: facts.sha256 for name, facts in manifest.files.items()}


class Runs:
    """Runs of one layout. clean: the folder of the one that nothing happens to."""

    def __init__(self, folder: Path, tokens: str, overrides: Sequence[str]) -> None:
        self.words = ["train", *TINY, f"data.path={tokens}", *overrides]
        self.folder, self.clean = folder, folder / "clean"
        assert main([*self.words, f"run.dir={self.clean}"]) == 0

    def with_faults(self, name: str, plan: list[dict[str, Any]], *overrides: str) -> list[str]:
        """Run with faults and restarts for all, and compare with the clean run. Returns the lines about them."""
        code, said = self.start(name, f"fault.plan={hydra(plan)}", f"run.max_restarts={len(plan)}", *overrides)
        assert code == 0, "\n".join(said)
        self.compare(self.folder / name)
        return said

    def start(self, name: str, *overrides: str) -> tuple[int, list[str]]:
        """The exit code of the run `name`, and what it says on standard error."""
        said = io.StringIO()
        with redirect_stderr(said):
            code = main([*self.words, f"run.dir={self.folder / name}", *overrides])
        return code, said.getvalue().strip().splitlines()

    def compare(self, folder: Path) -> None:
        """Every step once, every figure and all of the last state to the bit."""
        assert trajectory(folder) == trajectory(self.clean)
        assert final_state(folder) == final_state(self.clean)


def causes(said: Sequence[str]) -> list[str]:
    """The line before each restart."""
    return [said[index - 1] for index, line in enumerate(said) if RESTART.fullmatch(line)]


def hydra(plan: Sequence[dict[str, Any]]) -> str:
    """A plan as an override has it."""
    return "[" + ",".join("{" + ",".join(f"{key}: {value}" for key, value in one.items()) + "}" for one in plan) + "]"


def fault(rank: int, step: int, phase: str, kind: str, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "step": step, "phase": phase, "kind": kind, **more}
