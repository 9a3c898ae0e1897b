"""A run that earlier code began goes on as it would have then: its `config.yaml`, its checkpoint, the next two steps.

How `old/` was made: `tests/checkpoint/old_run.py`.
"""

import json
from typing import Any

import numpy as np
import pytest

from megapar.config import file
from megapar.config.check import check
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from tests.checkpoint.old_run import OLD, RUNS, go_on, of_all
from tests.tiny import write_tokens

TOLERANCE = {"fp64": 1e-12, "fp32": 1e-6}  # relative; another layout adds in another order
MOVES: list[tuple[str, str, dict[str, Any]]] = [
    ("tp2dp2_zero_fp64", "single", {"parallel.zero": 0}),
    ("tp2dp2_zero_fp64", "tp2dp2", {}),
    ("tp2dp2_zero_fp64", "dp4", {}),
    ("tp2pp2_tied_fp32", "single", {}),
    ("tp2pp2_tied_fp32", "pp2dp2", {"parallel.zero": 1}),
]


# Documents that were held out when `old/` was made: the hash of token files looked at their first 64 tokens then.
HELD_OUT = [6, 32, 38]


@pytest.fixture(scope="module")
def old_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model's token files with the split of that time beside them."""
    prefix = write_tokens(tmp_path_factory.mktemp("old"))
    hashes = np.full(40, 1 << 63, dtype=np.uint64)
    hashes[HELD_OUT] = 0
    np.save(f"{prefix}.split.npy", hashes)
    return prefix


def config_of(run: str) -> TrainConfig:
    return file.load(TrainConfig, OLD / run / "config.yaml")


@pytest.mark.parametrize(("run", "layout", "values"), MOVES, ids=[f"{run}-{layout}" for run, layout, _ in MOVES])
def test_goes_on(pool: WorkerPool, old_tokens: str, run: str, layout: str, values: dict[str, Any]) -> None:
    axes = {f"parallel.{axis}": size for axis, size in Layout.parse(layout).items()}
    config = changed(config_of(run), {"data.path": old_tokens, "data.prefix": old_tokens} | axes | values)
    check(config)
    found = of_all(pool.run(go_on, config.parallel.layout.world, config, str(OLD / run)))
    expected = json.loads((OLD / run / "figures.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in found] == [3, 4]
    for row, old in zip(found, expected, strict=True):
        assert row == pytest.approx(old, rel=TOLERANCE[config.train.dtype], abs=0.0)


@pytest.mark.parametrize("run", RUNS)
def test_configuration_is_read(run: str) -> None:
    """And says what it said."""
    config = config_of(run)
    assert str(config.parallel.layout) == RUNS[run][0]
    assert config.model.vocab_size == 61 and config.model.tied == ("tied" in run)
    assert config.train.dtype == run.rpartition("_")[2] and config.optim.lr == 0.01


def test_everything_old_is_tried() -> None:
    assert {path.name for path in OLD.iterdir()} == set(RUNS) == {run for run, _, _ in MOVES}
