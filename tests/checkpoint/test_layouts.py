"""What one layout writes, every other reads, bit for bit; and a resumed run is the run that was never interrupted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapar.checkpoint import read_manifest
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.part import DTYPES
from megapar.verify import BOUNDS
from tests.checkpoint import jobs
from tests.tiny import GPT2, tiny_config

ZERO = {"parallel.zero": 1}
FOUR_LAYERS = {"model.layers": 4}
UNEVEN = {"model.layers": 3}
BF16 = {"train.dtype": "bf16"}
ODD_ROWS = {"model.hidden": 20, "model.head_dim": 4}  # shares of ZeRO-1 begin and end in the middle of a row
MUON = {"optim.name": "muon"}

# (written in, of it, [(read in, of it)], of both)
Setting = tuple[str, dict[str, Any]]
MOVES: list[tuple[Setting, list[Setting], dict[str, Any]]] = [
    (
        ("tp2pp2dp2", ZERO),
        [("tp2pp2dp2", ZERO), ("single", {}), ("tp4", {}), ("dp2", {}), ("pp2", {})],
        {},
    ),
    (("tp4", {}), [("tp2pp2", {}), ("single", {})], {}),
    (("pp2dp2", ZERO), [("tp4", {}), ("tp2pp2", {})], GPT2),
    (("single", {}), [("pp2dp2", ZERO)], GPT2),
    (("dp2", ZERO), [("pp4", {})], FOUR_LAYERS),
    (("pp2", {"pipeline.partition": [2, 1]}), [("pp3", {}), ("tp2", {})], UNEVEN),
    (("tp2dp2", ZERO), [("dp2", BF16 | ZERO)], {"train.dtype": "fp32"} | ODD_ROWS),
    (("tp2dp2", ZERO | BF16), [("single", BF16), ("pp2", {"train.dtype": "fp32"})], {}),
    (("tp2dp2", ZERO), [("dp2", BF16 | ZERO), ("pp2", {})], MUON | ODD_ROWS | {"train.dtype": "fp32"}),
    (("pp2", {}), [("tp2dp2", ZERO)], {"optim.name": "lion"}),
]

CHUNKS = {"pipeline.schedule": "zbv", "model.layers": 4}
TIED = {"model.tied": True}
ON: list[tuple[Setting, list[Setting], dict[str, Any]]] = [
    (("tp2pp2", {}), [("pp2dp2", ZERO), ("single", {})], TIED),
    (("pp2", CHUNKS), [("pp2", {}), ("dp2", ZERO)], FOUR_LAYERS),
    (("tp2dp2", ZERO), [("pp2", {"pipeline.partition": [2, 1]}), ("tp2dp2", {})], UNEVEN),
    (("dp2", {}), [("pp2", CHUNKS), ("tp2", {})], FOUR_LAYERS | TIED),
]


def run(pool: WorkerPool, config: TrainConfig, steps: int, **paths: Any) -> list[jobs.RankState]:
    return pool.run(jobs.run, config.parallel.layout.world, config, steps, paths.get("load_from"), paths.get("save_to"))


@pytest.mark.parametrize(
    ("source", "targets", "both"), MOVES, ids=[f"{move[0][0]}-{number}" for number, move in enumerate(MOVES)]
)
def test_bitwise_in_every_layout(
    pool: WorkerPool, tokens: str, tmp_path: Path, source: Setting, targets: list[Setting], both: dict[str, Any]
) -> None:
    written = run(pool, tiny_config(tokens, source[0], **both | source[1]), 2, save_to=str(tmp_path))
    expected = jobs.assemble(written)
    kinds = {name.partition("/")[0] for name, values in expected.items() if values.any()}
    name = both.get("optim.name", "adamw")
    state = {"adamw": {"exp_avg", "exp_avg_sq"}, "lion": {"exp_avg"}, "muon": {"exp_avg", "exp_avg_sq", "momentum"}}[
        name
    ]
    assert kinds == {"weight"} | state
    assert (name == "muon") == ("exp_avg_sq/layers.0.mlp.up.weight" not in expected) or name == "lion"
    for layout, values in targets:
        config = tiny_config(tokens, layout, **both | values)
        ranks = run(pool, config, 2, load_from=str(tmp_path))
        found = jobs.assemble(ranks)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=f"{name} in {layout}")
        jobs.check_parameters(ranks, found, DTYPES[config.train.dtype])
        assert {rank.steps for rank in ranks} == {2}


def test_manifest_tells_where_training_stood(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    config = tiny_config(tokens, "tp2")
    run(pool, config, 2, save_to=str(tmp_path))
    manifest = read_manifest(tmp_path / "step-00000002")
    assert (manifest.step, manifest.optimizer_steps, manifest.samples, manifest.seed) == (2, 2, 16, 1234)
    assert manifest.layout == "tp2"
    assert manifest.kinds == {"weight": "F64", "exp_avg": "F64", "exp_avg_sq": "F64"}
    assert manifest.parameters["embedding.weight"].shape == (61, 16)
    assert manifest.config["model"]["kv_heads"] == 2
    assert (tmp_path / "latest").read_text() == "step-00000002\n"


@pytest.mark.parametrize(
    "extra", [ZERO, ZERO | GPT2 | {"model.dropout": 0.1}, ZERO | MUON], ids=["llama", "gpt2", "muon"]
)
def test_resume_equals_no_interruption(pool: WorkerPool, tokens: str, tmp_path: Path, extra: dict[str, Any]) -> None:
    config = tiny_config(tokens, "tp2pp2dp2", **extra)
    whole = run(pool, config, 4)
    first = run(pool, config, 2, save_to=str(tmp_path))
    second = run(pool, config, 4, load_from=str(tmp_path))
    assert [a.losses + b.losses for a, b in zip(first, second, strict=True)] == [rank.losses for rank in whole]
    expected, found = jobs.assemble(whole), jobs.assemble(second)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    elsewhere = tiny_config(tokens, "tp4", **extra)
    moved = jobs.assemble(run(pool, elsewhere, 4, load_from=str(tmp_path)))
    for name, value in expected.items():
        if name.startswith("weight/"):
            error = np.abs(moved[name] - value).max() / config.optim.lr
            assert error <= BOUNDS["fp64"]["update"], name


@pytest.mark.more
@pytest.mark.parametrize(("source", "targets", "both"), ON, ids=["tied", "chunks", "uneven", "to-chunks"])
def test_the_next_losses_are_those_of_the_uninterrupted_run(
    pool: WorkerPool, tokens: str, tmp_path: Path, source: Setting, targets: list[Setting], both: dict[str, Any]
) -> None:
    """To the rounding of fp64's sums, of the first step and of twenty (measured: 2e-16 for all). 1e-12 leaves room for
    another BLAS, and 1e-9 for rounding that grows with the steps."""

    def losses(setting: Setting, first: int, steps: int, **paths: Any) -> np.ndarray:
        config = tiny_config(tokens, setting[0], **both | setting[1] | {"train.steps": 22})
        parts = np.array([rank.losses for rank in run(pool, config, steps, **paths)])
        return parts[:, first:].sum(axis=0)

    whole = losses(source, 2, 22)
    losses(source, 2, 2, save_to=str(tmp_path))
    np.testing.assert_array_equal(losses(source, 0, 22, load_from=str(tmp_path)), whole)
    for target in targets:
        found = losses(target, 0, 22, load_from=str(tmp_path))
        assert len(found) == 20 and found[0] == pytest.approx(whole[0], rel=1e-12)
        np.testing.assert_allclose(found, whole, rtol=1e-9)


@pytest.mark.parametrize(("saved", "now"), [("adamw", "muon"), ("lion", "adamw")])
def test_the_state_of_another_optimizer_is_refused(
    saved: str, now: str, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    run(pool, tiny_config(tokens, "tp2", **{"optim.name": saved}), 1, save_to=str(tmp_path))
    config = tiny_config(tokens, "dp2", **{"optim.name": now})
    for line in pool.run(jobs.refused, 2, config, str(tmp_path)):
        assert line.startswith(f"optim.name={now}: ") and "\n" not in line
        assert f"saved {saved} -> now {now}" in line and "checkpoint.weights" in line


def test_precision_that_fits_is_kept(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """fp64 state in an fp32 run is rounded once, to the nearest."""
    written = jobs.assemble(run(pool, tiny_config(tokens), 2, save_to=str(tmp_path)))
    found = jobs.assemble(run(pool, tiny_config(tokens, "tp2", **{"train.dtype": "fp32"}), 2, load_from=str(tmp_path)))
    for name, value in written.items():
        np.testing.assert_array_equal(found[name], torch.from_numpy(value).float().double().numpy(), err_msg=name)
