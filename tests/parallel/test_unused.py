"""Parameters that a micro-batch did not use, and weights that three stages hold: the numbers of one process."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from megapar import verify
from megapar.config.errors import UserError
from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_parts
from megapar.launch.pool import PoolError, WorkerPool
from megapar.models.stage import TransformerStage, build_stage
from megapar.parallel.context import StageContext
from megapar.parallel.layers import ColumnParallelLinear, RowParallelLinear
from megapar.parallel.record import Constant, Normal, ParameterRecord
from megapar.parallel.weight_grad import AddBias, owned_op
from megapar.train.trainer import Trainer
from tests.pairwise import pairwise
from tests.parallel.layouts import compare, verify_config
from tests.tiny import tiny_config

RULES: dict[str, Callable[[int], bool]] = {
    "some": lambda sample: sample % 3 == 0,
    "odd": lambda sample: sample % 2 == 1,  # with two data-parallel ranks: none of the first, all of the second
    "none": lambda sample: False,
}


class Detour(nn.Module):
    """A layer, and behind it what only some samples pass: parallel layers and a plain one."""

    def __init__(self, layer: nn.Module, context: StageContext, hidden: int, name: str, rule: str) -> None:
        super().__init__()
        self.layer, self.takes = layer, RULES[rule]
        self.up = ColumnParallelLinear(context, hidden, [(f"{name}.up", 12, None)], init=Normal(0.3), bias=True)
        self.down = RowParallelLinear(context, f"{name}.down", 12, hidden, init=Normal(0.3), bias=True)
        self.plain = nn.Linear(hidden, hidden, dtype=context.dtype)

    def forward(self, x: Tensor, tokens: Any) -> Tensor:
        x = self.layer(x, tokens)
        if self.takes(int(tokens.samples[0])):  # micro-batches have one sample
            x = self.plain(x + self.down(torch.tanh(self.up(x))))
        return x


def with_detours(config: TrainConfig, context: StageContext, rule: str) -> TransformerStage:
    stage = build_stage(config, context)
    for name in ("1", "3"):
        if name in stage.layers:
            hidden = config.model.hidden
            stage.layers[name] = Detour(stage.layers[name], context, hidden, f"layers.{name}.detour", rule)
    return stage


class Shared(nn.Module):
    """A layer, and behind it a bias that others have too."""

    def __init__(self, layer: nn.Module, context: StageContext, hidden: int) -> None:
        super().__init__()
        self.layer, self.context = layer, context
        record = ParameterRecord("shared.bias", (hidden,), Constant(0.1), tie="shared")
        self.owner = context.parameter(self, "bias", record)

    def forward(self, x: Tensor, tokens: Any) -> Tensor:
        return owned_op(AddBias, self.layer(x, tokens), self.owner, self.context.weight_grads)


def with_three_holders(config: TrainConfig, context: StageContext) -> TransformerStage:
    names = {"layers.0", "layers.2", "layers.5"}
    stages = stage_parts(config)
    holders = [number for number, parts in enumerate(stages) if names & {part.name for part in parts}]
    context.tie("shared", holders)
    stage = build_stage(config, context)
    for name in names:
        index = name.removeprefix("layers.")
        if index in stage.layers:
            stage.layers[index] = Shared(stage.layers[index], context, config.model.hidden)
    return stage


class Built:
    """A job of verify's whose Trainers have other stages; travels to the workers by pickle."""

    def __init__(self, job: str, build: Callable[..., Any]) -> None:
        self.job, self.build = job, build

    def __call__(self, rank: int, world_size: int, *args: Any) -> Any:
        with mock.patch.object(verify, "Trainer", partial(Trainer, build_stage=self.build)):
            return getattr(verify, self.job)(rank, world_size, *args)


@pytest.fixture
def built(pool: WorkerPool, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Compare a layout with one process, both with stages of one's own."""

    def run(layout: str, build: Callable[..., Any], **values: Any) -> verify.Verdict:
        for job in ("run_reference", "run_layout"):
            monkeypatch.setattr(verify, job, Built(job, build))
        [verdict] = compare(pool, tmp_path, verify_config(prefix, [layout], **values))
        return verdict

    return run


CASES = pairwise(
    {
        "layout": ["tp2", "pp2", "dp2", "dp3", "tp2pp2dp2"],
        "rule": list(RULES),
        "parallel.zero": [0, 1],
        "parallel.sequence_parallel": [False, True],
        "pipeline.schedule": ["1f1b", "zb_h1", "zbv"],
        "parallel.bucket_size": [500, 3000],
    }
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_unused_parameters_train_on(case: dict[str, Any], built: Callable[..., Any]) -> None:
    """A zero gradient, weight decay as configured, and no collective out of order, whoever used what."""
    values = {key: value for key, value in case.items() if "." in key} | {"parallel.check_gradients": False}
    verdict = built(case["layout"], partial(with_detours, rule=case["rule"]), **values)
    assert verdict.passed, verdict


@pytest.mark.parametrize("layout", ["single", "dp2"])
def test_a_forgotten_parameter_is_named_if_asked(layout: str, pool: WorkerPool, prefix: str) -> None:
    """With two data-parallel ranks the second uses it in every micro-batch."""
    values = {"train.micro_batch_size": 1, "parallel.check_gradients": True, "model.layers": 4}
    config = tiny_config(prefix, layout, **values)
    with pytest.raises(PoolError) as failed:
        pool.run(one_step, config.parallel.layout.world, config, partial(with_detours, rule="odd"))
    assert isinstance(failed.value.error, UserError)
    line = str(failed.value.error)
    for name in ("parallel.check_gradients=true", "layers.3.plain.bias", "layers.1.detour.up.weight"):
        assert name in line
    assert "layers.1.mlp" not in line


def one_step(rank: int, world_size: int, config: TrainConfig, build: Callable[..., Any]) -> None:
    Trainer(config, rank, build).step(1)


HOLDERS = pairwise(
    {
        "layout": ["pp3", "pp4", "tp2pp3", "pp3dp2"],
        "pipeline.schedule": ["1f1b", "interleaved", "zbv", "zb_h1"],
        "model.tied": [False, True],
        "parallel.zero": [0, 1],
    }
)


@pytest.mark.parametrize("case", HOLDERS, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_three_stages_may_hold_a_weight(case: dict[str, Any], built: Callable[..., Any]) -> None:
    """The first, a middle and the last one, beside the embedding that two may hold."""
    values = {key: value for key, value in case.items() if "." in key}
    values |= {"model.layers": 8, "train.steps": 1, "parallel.sequence_parallel": case["layout"].startswith("tp")}
    verdict = built(case["layout"], with_three_holders, **values)
    assert verdict.passed, verdict
