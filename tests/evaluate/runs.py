"""Small runs to evaluate, and what a plain loop says of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megapar.checkpoint import save
from megapar.config.derive import resolve_forward
from megapar.config.file import dump, load_config
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.data.tokenizer import open_tokenizer
from megapar.evaluate.config import EvalConfig
from megapar.generate.text import keep_tokenizer
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.evaluate import jobs
from tests.tiny import tiny_config

TAUGHT = {"red>": "blue", "cat>": "dog house", "seven>": "tree"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tp2pp2": {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": True},
    "dp2": {"parallel.dp": 2},
}


def train(folder: Path, steps: int = 2, **values: Any) -> Path:
    """The directory of a run of some steps."""
    config = tiny_config("", **values | {"run.dir": str(folder), "train.steps": steps})
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(config))
    keep_tokenizer(config)
    trainer = Trainer(config, 0)
    for step in range(1, steps + 1):
        trainer.step(step)
    save(folder / "checkpoints", trainer.optimizer, config, steps)
    trainer.close()
    return folder


def evaluate(pool: WorkerPool, run: Path, layout: str = "single", **values: Any) -> dict[str, Any]:
    """The figures of a run in fp64."""
    out = run.parent / f"{run.name}-{layout}.json"
    given = {"run.dir": str(run), "dtype": "fp64", "out": str(out)} | LAYOUTS[layout]
    config = resolve_forward(changed(EvalConfig(), given | values))
    assert set(pool.run(jobs.evaluate, config.parallel.layout.world, config)) == {None}
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


class Plainly:
    """A run's model in this process: a row at a time, without padding. Adapters' bases are what they were made of."""

    def __init__(self, run: Path) -> None:
        from megapar.checkpoint.load import load

        self.config: TrainConfig = load_config(run)
        self.tokenizer = open_tokenizer(run / "tokenizer.model")
        trainer = Trainer(self.config, 0)
        load(run, trainer.optimizer, self.config)
        [self.stage] = trainer.stages.values()
        self.stage.train(False)

    def outputs(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        ids, samples = torch.tensor([list(tokens)]), torch.zeros(1, dtype=torch.int64)
        with torch.no_grad():
            return self.stage({}, {"ids": ids, "samples": samples, "step": torch.tensor(0)})

    def log_likelihood(self, before: Sequence[int], behind: Sequence[int]) -> float:
        """Of the tokens `behind`, in nats."""
        logits = self.outputs([*before, *behind][:-1])["logits"]
        likely = torch.log_softmax(logits, 1)[len(before) - 1 :]
        return float(likely[torch.arange(len(behind)), list(behind)].sum())
