"""A step computed twice: a flipped bit is found, named and outvoted, and the run is the one without it."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.launch.pool import WorkerPool
from megapar.parallel.weight_grad import LocalParameter
from megapar.train.loop import Loop
from megapar.train.trainer import Trainer
from tests.tiny import GPT2, tiny_config

RANK, STEP = 1, 2


def flip(x: torch.Tensor, bit: int) -> None:
    """In fp64 [..]'s first element, behind torch's back."""
    x.detach().numpy().view("u8").reshape(-1)[0] ^= 1 << bit


class Faulty(TorchDispatchMode):
    """On RANK in STEP the results of products with a weight come out wrong, so many times, each time in another bit.

    kind: product: y = x W; gradient: the addition to its main gradient
    """

    def __init__(self, loop: "Watched", parameter: LocalParameter, kind: str, times: int) -> None:
        super().__init__()
        self.loop, self.times = loop, times
        self.memory = (parameter.tensor if kind == "product" else parameter.grad).data_ptr()
        self.products = ("mm", "bmm", "addmm") if kind == "product" else ("addmm_", "addmm", "mm", "add_", "copy_")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, torch.Tensor)]
        here = any(one.data_ptr() == self.memory for one in operands)
        if here and self.times and self.loop.now == STEP and func._overloadpacket.__name__ in self.products:
            self.times -= 1
            flip(result, 30 + self.times)
        return result


class Watched(Loop):
    """now: the step that is being made."""

    now = 0

    def run(self) -> None:
        plain = self.trainer.step

        def step(number: int, *rest: Any) -> Any:
            self.now = number
            return plain(number, *rest)

        with mock.patch.object(self.trainer, "step", step):
            super().run()


def run_faulty(rank: int, world_size: int, config: TrainConfig, name: str, kind: str, times: int) -> str | None:
    """The error that ends the run, if one does."""
    loop = Watched(config, rank)
    found = [one for one in loop.trainer.context.parameters if one.name == name]
    try:
        if rank != min(RANK, world_size - 1) or not times:
            loop.run()
        elif kind == "memory":  # behind the back of what watches operations
            faulty, plain = Faulty(loop, found[0], "product", times), Trainer.local_gradients

            def local_gradients(*given: Any) -> Any:
                with faulty:
                    return plain(*given)

            with mock.patch.object(Trainer, "local_gradients", local_gradients):
                loop.run()
        else:
            with Faulty(loop, found[0], kind, times):
                loop.run()
    except UserError as error:
        return str(error)
    return None


def figures(folder: Path) -> list[tuple[Any, ...]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]


def notes(folder: Path) -> dict[int, dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["recheck"] for row in rows if "recheck" in row}


def config_of(tokens: str, folder: Path, layout: str, **values: Any) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    given: dict[str, Any] = {"run.dir": str(folder), "logger.wandb.mode": "disabled", "train.steps": 3}
    return tiny_config(tokens, layout, **given | {"run.recheck_every": STEP} | values)


def run(pool: WorkerPool, config: TrainConfig, name: str = "", kind: str = "", times: int = 0) -> list[str | None]:
    return pool.run(run_faulty, config.parallel.layout.world, config, name, kind, times)


@pytest.mark.parametrize(
    ("layout", "name", "kind"),
    [
        ("single", "layers.0.mlp.down.weight", "product"),
        ("dp2", "layers.0.mlp.down.weight", "gradient"),
        ("tp2", "layers.1.attention.out.weight", "product"),
        ("tp2", "layers.1.mlp.down.weight", "gradient"),
        ("pp2", "layers.1.mlp.down.weight", "product"),
        pytest.param("tp2pp2", "layers.0.mlp.down.weight", "product", marks=pytest.mark.more),
        pytest.param("pp2", "layers.1.mlp.down.weight", "gradient", marks=pytest.mark.more),
    ],
)
def test_a_flipped_bit_is_named_and_outvoted(
    layout: str, name: str, kind: str, pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    """Losses and norms have the bits of a run that nothing happens to and that checks nothing."""
    clean = config_of(tokens, tmp_path / "clean", layout, **{"run.recheck_every": 0})
    assert set(run(pool, clean)) == {None}
    faulty = config_of(tokens, tmp_path / "faulty", layout)
    assert set(run(pool, faulty, name, kind, 1)) == {None}
    assert figures(tmp_path / "faulty") == figures(tmp_path / "clean")
    found = notes(tmp_path / "faulty")
    assert list(found) == [STEP] and found[STEP]["ranks"] == [RANK if layout != "single" else 0]
    assert found[STEP]["where"].startswith("in ") and found[STEP]["where"].endswith(f" at {name}")
    assert json.loads((tmp_path / "faulty" / "summary.json").read_text())["recheck_faults"] == 1


def test_memory_that_changes_is_named_too(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    """A product that is right and changes before it is summed over tp: the other rank receives what is wrong."""
    config = config_of(tokens, tmp_path, "tp2", **{"train.steps": 2, "train.global_batch_size": 4})
    assert run(pool, config, "layers.1.mlp.down.weight", "memory", 1) == [None, None]
    assert notes(tmp_path)[STEP]["ranks"] == [RANK]
    assert notes(tmp_path)[STEP]["where"].endswith(" at layers.1.mlp.down.weight")


def test_a_bit_that_flips_every_time_ends_the_run(pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    config = config_of(tokens, tmp_path, "dp2", **{"train.global_batch_size": 4})
    said = run(pool, config, "layers.0.mlp.down.weight", "product", 3)
    assert said[0] is not None and said[0] == said[1] and "\n" not in said[0]
    assert said[0].startswith("step 2: three computations of its gradients give three results, first rank 1 in mm at")
    assert [step for step, _, _ in figures(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("layout", "values"),
    [
        ("tp2", {"parallel.sequence_parallel": True, "model.dropout": 0.1}),
        pytest.param("pp2dp2", GPT2 | {"parallel.zero": 1, "pipeline.schedule": "zb_h1"}, marks=pytest.mark.more),
        pytest.param("dp2", {"train.dtype": "bf16", "parallel.grad_compression": "int8_ef"}, marks=pytest.mark.more),
    ],
)
def test_a_run_without_faults_is_the_run_without_checks(
    layout: str, values: dict[str, Any], pool: WorkerPool, tokens: str, tmp_path: Path
) -> None:
    for folder, every in (("plain", 0), ("checked", STEP)):
        config = config_of(tokens, tmp_path / folder, layout, **values | {"run.recheck_every": every})
        assert set(run(pool, config)) == {None}
    assert figures(tmp_path / "plain") == figures(tmp_path / "checked")
    assert notes(tmp_path / "checked") == {}
