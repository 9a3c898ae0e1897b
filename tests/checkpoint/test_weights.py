"""Weights alone: into a fresh optimizer, whatever the layout that wrote them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.checkpoint import load_weights, read_manifest, save
from megapar.checkpoint.load import refuse_other_model
from megapar.config.errors import ConfigError
from megapar.config.keys import changed
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.checkpoint.jobs import run, state_of
from tests.tiny import tiny_config


def fine_tune(rank: int, world_size: int, config: TrainConfig, folder: str) -> tuple[bool, int, float]:
    """Whether all moments are zero and all parameters those that were saved; updates made; the loss of step 1."""
    trainer = Trainer(config, rank)
    load_weights(folder, trainer.optimizer, config)
    state = trainer.optimizer.tensors()
    fresh = not any(part.any() for kind in ("exp_avg", "exp_avg_sq") for part in state[kind])
    return fresh, trainer.optimizer.steps, trainer.step(1).loss


@pytest.mark.parametrize(("layout", "zero"), [("single", 0), ("dp2", 1)])
def test_weights_alone(layout: str, zero: int, pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    saved = pool.run(run, 1, tiny_config(tokens), 3, None, str(tmp_path))[0]
    values: dict[str, Any] = {"parallel.zero": zero, "train.seed": 7}
    config = tiny_config(tokens, layout, **values)
    ranks = config.parallel.layout.world
    found = pool.run(fine_tune, ranks, config, str(tmp_path))
    assert [rank[:2] for rank in found] == [(True, 0)] * ranks
    trainer = Trainer(changed(tiny_config(tokens), {"train.seed": 7}), 0)
    before = {name: value for kind, name, box, value in saved.owned if kind == "weight"}
    for kind, name, box, _ in state_of(trainer, []).owned:
        assert kind != "weight" or before[name].shape == tuple(box.shape)
    expected = tmp_path / "again"
    with torch.no_grad():
        load_weights(tmp_path, trainer.optimizer, trainer.config)
    assert {name: value.tobytes() for kind, name, _, value in state_of(trainer, []).owned if kind == "weight"} == {
        name: value.tobytes() for name, value in before.items()
    }
    save(expected, trainer.optimizer, trainer.config, 0)
    assert sum(rank[2] for rank in found) == pytest.approx(trainer.step(1).loss, rel=1e-12)


def test_a_table_of_positions_has_its_length(tokens: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"model.position": "learned"}
    trainer = Trainer(tiny_config(tokens, **values), 0)
    manifest = read_manifest(save(tmp_path, trainer.optimizer, trainer.config, 0))
    longer = changed(trainer.config, {"train.seq_length": 16})
    with pytest.raises(ConfigError, match=r"^train.seq_length=16: .* was trained with 8; use train.seq_length=8$"):
        refuse_other_model(manifest, longer, tmp_path)
    trainer.close()
