"""The runs whose checkpoints are kept in `old/`, and what ranks do with them.

    python -m tests.checkpoint.old_run FOLDER     write both anew, with the code that is here

They were written so by commit 840ad29, and are there to be read by later code: what is made anew belongs beside them,
under a name of its own, once the format has a new version. Each has `config.yaml` as a run directory has it,
`checkpoints/` after two steps, and `figures.json` with loss and gradient norm of the two steps that followed.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from megapar.checkpoint import load, save
from megapar.config import file
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.tiny import GPT2, tiny_config, write_tokens

OLD = Path(__file__).with_name("old")
SMALL: dict[str, Any] = {
    "model.hidden": 8,
    "model.ffn": 12,
    "parallel.bucket_size": 300,
    "logger.wandb.mode": "disabled",
}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "tp2dp2_zero_fp64": ("tp2dp2", {"parallel.zero": 1, "model.layers": 1}),
    "tp2pp2_tied_fp32": ("tp2pp2", GPT2 | {"train.dtype": "fp32"}),
}
STOPPED, STEPS = 2, 4

Figures = list[tuple[int, float, float]]  # (step, this rank's part of the loss, gradient norm)


def write(rank: int, world_size: int, config: TrainConfig, folder: str) -> Figures:
    """Train, save after STOPPED steps, go on. Returns the figures of the steps after that."""
    trainer = Trainer(config, rank)
    _steps(trainer, 1, STOPPED)
    save(Path(folder), trainer.optimizer, config, STOPPED)
    figures = _steps(trainer, STOPPED + 1, STEPS)
    trainer.close()
    return figures


def go_on(rank: int, world_size: int, config: TrainConfig, folder: str) -> Figures:
    """Load, and train to the end."""
    trainer = Trainer(config, rank)
    resumed = load(folder, trainer.optimizer, config)
    assert (resumed.step, resumed.samples) == (STOPPED, STOPPED * config.train.global_batch_size)
    figures = _steps(trainer, resumed.step + 1, STEPS)
    trainer.close()
    return figures


def _steps(trainer: Trainer, first: int, last: int) -> Figures:
    done = [(step, trainer.step(step)) for step in range(first, last + 1)]
    return [(step, one.loss, one.result.grad_norm) for step, one in done]


def of_all(ranks: list[Figures]) -> list[dict[str, float]]:
    """The run's figures by step."""
    return [
        {"step": step, "loss": sum(one[at][1] for one in ranks), "grad_norm": norm}
        for at, (step, _, norm) in enumerate(ranks[0])
    ]


def main(folder: Path) -> None:
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # paths in what is kept are relative: it is read on other machines
        prefix = write_tokens(Path("."))
        with WorkerPool(4) as pool:
            for name, (layout, values) in RUNS.items():
                config = tiny_config(prefix, layout, **(SMALL | values | {"run.dir": f"runs/{name}"}))
                run = folder / name
                run.mkdir(parents=True)
                figures = of_all(pool.run(write, config.parallel.layout.world, config, str(run / "checkpoints")))
                (run / "config.yaml").write_text(file.dump(config), encoding="utf-8")
                (run / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
