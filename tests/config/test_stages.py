"""What stages hold and cost by configuration alone: balance, devices, costs of an earlier run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.config import ConfigError, TrainConfig, check, resolve
from megapar.config.keys import changed
from megapar.config.model import parts
from megapar.config.stages import make_schedule, part_costs, stage_costs, stage_layers
from megapar.mesh import Mesh
from megapar.models.stage import TransformerStage
from megapar.parallel.buffers import StageBuffers
from megapar.parallel.context import StageContext
from megapar.schedule.build import build
from megapar.schedule.simulate import simulate


def config_of(**values: Any) -> TrainConfig:
    """12 layers on 4 ranks with a head of about three of them."""
    small = {
        "model.layers": 12,
        "model.hidden": 64,
        "model.heads": 4,
        "model.ffn": 192,
        "model.vocab_size": 2400,
        "train.seq_length": 32,
        "train.global_batch_size": 32,
        "parallel.pp": 4,
        "pipeline.partition": "balanced",
    }
    return resolve(changed(TrainConfig(), small | values))


def slowest(config: TrainConfig) -> float:
    costs = stage_costs(config)
    return max(map(sum, zip(costs.forward, costs.input_grad, costs.weight_grad, strict=True)))


def test_the_head_counts() -> None:
    config = config_of()
    check(config)
    counts = stage_layers(config)
    assert counts[-1] == min(counts) < 3 and sum(counts) == 12
    assert slowest(config) < 0.75 * slowest(changed(config, {"pipeline.partition": "uniform"}))
    assert stage_layers(config_of(**{"parallel.pp": 1, "pipeline.schedule": "zbv"})) == [12]


def test_a_slow_device_holds_less() -> None:
    config = config_of(**{"pipeline.speed": [1.0, 0.4, 1.0, 1.0], "model.vocab_size": 10})
    check(config)
    counts = stage_layers(config)
    assert counts[1] == min(counts) == 1 or counts[1] * 2 <= min(counts[0], counts[2], counts[3])
    assert slowest(config) < 0.6 * slowest(changed(config, {"pipeline.partition": "uniform"}))


def test_a_slow_device_holds_less_with_several_stages_a_rank() -> None:
    """In a V the first and the last stage are on rank 0."""
    config = config_of(**{"pipeline.speed": [0.4, 1.0, 1.0, 1.0], "pipeline.schedule": "zbv", "model.layers": 24})
    check(changed(config, {"pipeline.device_memory": [1.0] * 4}))
    counts = stage_layers(changed(config, {"model.vocab_size": 10}))
    assert len(counts) == 8 and max(counts[0], counts[7]) * 2 <= min(counts[1:7])


def test_a_small_device_holds_less() -> None:
    layer = config_of(**{"model.vocab_size": 10})
    whole = 12 * (64 * 64 * 4 + 3 * 64 * 192) * 16 / 2**30  # GiB of weights, gradients and moments in fp32
    memory = [whole, whole, whole / 12, whole]
    with pytest.raises(ConfigError, match=r"device_memory=.*don't fit"):
        check(changed(layer, {"pipeline.device_memory": [whole / 5] * 4}))
    roomy = changed(layer, {"pipeline.device_memory": [2 * whole] * 4})
    assert stage_layers(roomy) == [3, 3, 3, 3]
    held = simulate(make_schedule(roomy)).peak  # micro-batches that each rank holds at once
    activations = parts(layer)[1].activation / 2**30
    memory[2] = 1.5 * (whole / 12 + held[2] * activations)
    small = changed(layer, {"pipeline.device_memory": [2 * whole, 2 * whole, memory[2], 2 * whole]})
    check(small)
    assert stage_layers(small)[2] == 1


def test_measured_costs_decide(tmp_path: Path) -> None:
    """A file of one number per layer: here the first three layers take as much as the others together."""
    path = tmp_path / "costs.json"
    times = [3.0] * 3 + [1.0] * 9
    path.write_text(json.dumps({"forward": times, "input_grad": times, "weight_grad": times}))
    config = config_of(**{"pipeline.costs": str(path)})
    check(config)
    assert slowest(config) == 18.0  # two of the first layers: nothing is better
    assert sum(stage_costs(config).forward) == 18.0
    with pytest.raises(ConfigError, match=r"costs of 12 layers, and model.layers=8"):
        check(changed(config, {"model.layers": 8}))
    with pytest.raises(ConfigError, match=r"pipeline.costs=.*not readable as costs: No such file"):
        check(changed(config, {"pipeline.costs": str(tmp_path / "none.json")}))


def test_the_head_may_be_alone() -> None:
    """Where it costs more than the layers of a stage do."""
    config = config_of(**{"model.vocab_size": 12000})
    check(config)
    counts = stage_layers(config)
    assert counts[-1] == 0 and sum(counts) == 12
    for partition, message in (([4, 0, 4, 4], "only the ends may be 0"), ([4, 4, 4, 1], "add up to model.layers=12")):
        with pytest.raises(ConfigError, match=message):
            check(changed(config, {"pipeline.partition": partition}))
    check(changed(config, {"pipeline.partition": [0, 6, 6, 0]}))


def test_measured_embedding_and_head_are_parts_of_their_own(tmp_path: Path) -> None:
    """A file that says what of its first and last numbers is theirs; without that they can't be parted."""
    path = tmp_path / "costs.json"
    times = [1.5] + [1.0] * 10 + [5.0]
    data: dict[str, Any] = {"forward": times, "input_grad": times, "weight_grad": times}
    path.write_text(json.dumps(data))
    config = config_of(**{"pipeline.costs": str(path)})
    assert part_costs(config).forward == (0.0, *times, 0.0)
    path.write_text(json.dumps(data | {"embedding": [0.5] * 3, "head": [4.0] * 3}))
    assert part_costs(config).forward == (0.5, *[1.0] * 12, 4.0)
    assert stage_layers(config)[-1] == 0
    path.write_text(json.dumps(data | {"head": [4.0]}))
    with pytest.raises(ConfigError, match="head must be"):
        check(config)


def test_auto_is_written_for_the_stages_costs(tmp_path: Path) -> None:
    """Under uneven costs the schedule made for them is faster than the one made for even ones."""
    path = tmp_path / "costs.json"
    path.write_text('{"forward": [1, 2, 2, 3], "input_grad": [3, 2, 3, 1], "weight_grad": [2, 1, 3, 2]}')
    values = {"model.layers": 4, "pipeline.schedule": "auto", "pipeline.memory_limit": 4, "pipeline.costs": str(path)}
    config = config_of(**values)
    costs, written = stage_costs(config), make_schedule(config)
    assert simulate(written, costs).step_time == 67.0
    assert simulate(build("auto", 4, 8, memory_limit=4), costs).step_time == 69.0
    assert max(simulate(written, costs).peak) <= 4
    with pytest.raises(ConfigError, match="can't hold one micro-batch"):
        check(changed(config, {"pipeline.memory_limit": 0.5}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pipeline.speed": [1.0, 2.0]}, "speed=.*4 numbers"),
        ({"pipeline.speed": [1.0, 2.0, 0.0, 1.0]}, "more than 0"),
        ({"pipeline.device_memory": [1.0] * 4, "pipeline.partition": "uniform"}, "has no effect here"),
        ({"pipeline.speed": [1.0] * 4, "pipeline.partition": "uniform"}, "has no effect here"),
        ({"pipeline.memory_limit": 3.0}, "has no effect here; it is used only with pipeline.schedule=auto"),
        ({"pipeline.rebalance": -1}, "at least 0"),
        ({"pipeline.partition": "even"}, "uniform, balanced, or"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(config_of(**values))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "style", [{}, {"model.activation": "geglu"}, {"model.activation": "gelu", "model.norm": "layernorm"}]
)
def test_activation_bytes_are_about_what_autograd_keeps(recompute: str, style: dict[str, Any]) -> None:
    """Within a quarter of the bytes of all different storages saved by the middle one of three stages' layers."""
    config = config_of(**{"train.recompute": recompute, "model.layers": 4, "parallel.pp": 1} | style)
    context = StageContext(Mesh(), placement=(0,) * 3, stage=1)
    layers = [part for part in parts(config) if part.kind == "layer"]
    stage = TransformerStage(context, config, layers, sends=("hidden",))
    StageBuffers(context, bucket_size=1000, zero=False)
    weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    train = config.train
    ids = torch.zeros(train.micro_batch_size, train.seq_length, dtype=torch.int64)
    batch = {"ids": ids, "samples": torch.arange(train.micro_batch_size), "step": torch.tensor(1)}
    hidden = torch.randn(ids.numel(), config.model.hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = stage({"hidden": hidden}, batch)
    assert outputs["hidden"].requires_grad
    assert layers[0].activation == pytest.approx(sum(kept.values()) / 4, rel=0.25)
    assert sum(part_costs(config).activation) == pytest.approx(1.0)
