"""The snippets of docs/howto run as they stand, and their commands are ones that would start."""

import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megapar import update_rules
from megapar.checkpoint.hf.family import in_full, to_model
from megapar.checkpoint.hf.folder import logical_shapes, places
from megapar.cli.command import commands
from megapar.cli.compose import compose, split
from megapar.cli.finish import check_early
from megapar.config import layout, schema
from megapar.config.derive import resolve
from megapar.config.keys import keys
from megapar.config.schema import TrainConfig, VerifyConfig
from megapar.data import source
from megapar.launch.pool import WorkerPool
from megapar.models.stage import build_stage
from megapar.parallel import layers
from megapar.parallel.context import StageContext
from megapar.tasks.kinds import lm
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

GUIDES = Path(__file__).parents[1] / "docs" / "howto"
# These have tests of their own, which put their files beside the others.
ELSEWHERE = {"add-a-command.md", "add-a-kernel.md", "add-a-schedule.md"}
MADE_BY_A_GUIDE = ("grouped", "scaled_silu", "cp2", "tail", "RUN")  # such commands, too


def snippets(guide: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (GUIDES / guide).read_text(), re.DOTALL)


def commands_of(guide: Path) -> list[str]:
    found = re.findall(r"(?:`|^)megapar ([a-z][^`\n]*=[^`\n]*)", guide.read_text(), re.MULTILINE)
    return [line for line in found if not any(name in line for name in MADE_BY_A_GUIDE)]


COMMANDS = [(guide.name, line) for guide in sorted(GUIDES.glob("*.md")) for line in commands_of(guide)]


def test_every_snippet_is_run() -> None:
    here = inspect.getsource(inspect.getmodule(snippets) or layout)
    for guide in GUIDES.glob("*.md"):
        assert not snippets(guide.name) or guide.name in ELSEWHERE or f'snippets("{guide.name}")' in here, guide.name
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize(("guide", "line"), COMMANDS)
def test_a_command_would_start(guide: str, line: str) -> None:
    name, *words = line.split()
    config = compose(name, split(words))
    assert isinstance(config, commands()[name].config)
    if isinstance(config, TrainConfig) and not isinstance(config, VerifyConfig):
        check_early(config, gpus=0)


def test_a_config_key() -> None:
    (snippet,) = snippets("add-a-config-key.md")
    made: dict[str, Any] = {}
    exec(f"@dataclass(frozen=True)\nclass Group:\n{textwrap.indent(snippet, '    ')}", vars(schema) | {}, made)
    facts = keys(made["Group"])["label_smoothing"]
    assert (made["Group"]().label_smoothing, facts.refusal(1.0)) == (0.0, "must be less than 1")


def test_an_optimizer(tokens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file beside the others: one step is its formula."""
    (snippet,) = snippets("add-an-optimizer.md")
    (tmp_path / "sgd.py").write_text(snippet)
    monkeypatch.setattr(update_rules, "__path__", [*update_rules.__path__, str(tmp_path)])
    assert update_rules.optimizer_names() == ["adamw", "lion", "muon", "sgd"]
    values: dict[str, Any] = {"optim.name": "sgd", "optim.clip_grad": 0.0}
    trainer = Trainer(tiny_config(tokens, **values), 0)
    before = [part.clone() for part in trainer.buffers.params]
    rate = trainer.step(1).lr
    steps = [rate * 0.05 * grads for grads in trainer.buffers.grads]
    [decayed] = [held for held in trainer.buffers.held() if held.piece.record.name == "head.weight"]
    expected = decayed.view(before) * (1 - rate * 0.1) - decayed.view(steps)
    assert torch.allclose(decayed.view(trainer.buffers.params), expected, rtol=1e-13)
    trainer.close()


def test_a_task_and_a_source() -> None:
    task, counting = snippets("add-a-task.md")
    made: dict[str, Any] = {}
    exec(task, vars(lm) | {}, made)
    assert made["TASK"] == lm.TASK
    exec(counting, vars(source) | {"prepare": source.find_source, "open": open}, made)
    assert (made["SOURCE"].name, made["SOURCE"].prepare) == ("counting", source.find_source)


def test_an_axis() -> None:
    (snippet,) = snippets("add-an-axis.md")
    (kind,) = eval(snippet, vars(layout) | {})
    assert (kind.name, kind.splits) == ("cp", "tokens")


def test_a_family() -> None:
    """Its config.json is read as the model that it was written for, and every parameter has a place."""
    (snippet,) = snippets("add-a-family.md")
    made: dict[str, Any] = {}
    exec(snippet, made)
    (family,) = made["FAMILIES"]
    config = resolve(TrainConfig(), vocab_size=100)
    again = to_model(family.model_keys(family.disk_config(config.model, 64)))
    assert in_full(again) == in_full(config.model)
    there, _ = places(family, logical_shapes(config), "")
    assert there["layers.1.norm2.weight"].disk == "model.layers.1.post_attention_layernorm.weight"


class Scaled(nn.Module):
    """A layer with the guide's behind it."""

    def __init__(self, layer: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale

    def forward(self, x: torch.Tensor, tokens: Any) -> torch.Tensor:
        return self.scale(self.layer(x, tokens))


def stage_with_scales(config: TrainConfig, context: StageContext) -> Any:
    declared, op, forward = snippets("add-a-layer.md")
    made: dict[str, Any] = dict(vars(layers))
    exec(f"{op}\n{declared}{forward}", made)
    stage: Any = build_stage(config, context)
    for name, layer in list(stage.layers.items()):
        stage.layers[name] = Scaled(layer, made["ChannelScale"](context, f"layers.{name}.scale", config.model.hidden))
    return stage


def scale_gradients(rank: int, world_size: int, config: TrainConfig) -> dict[str, torch.Tensor]:
    trainer, found = Trainer(config, rank, stage_with_scales), {}

    def keep() -> None:
        for held in trainer.buffers.held():
            if ".scale." in held.piece.record.name:
                found[held.piece.record.name] = held.view(trainer.buffers.grads).clone()

    trainer.step(1, keep)
    trainer.close()
    return found


def test_a_layers_op_is_its_derivative() -> None:
    made: dict[str, Any] = dict(vars(layers))
    exec(snippets("add-a-layer.md")[1], made)
    x, weight, grad = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    y, into = made["Scale"].forward(x, weight[0]), torch.zeros(3, dtype=torch.float64)
    of_x, of_weight = torch.autograd.grad(y, (x, weight), grad)
    made["Scale"].add_weight_grad(grad.detach(), x.detach(), into)
    torch.testing.assert_close(into, of_weight[0])
    torch.testing.assert_close(made["Scale"].input_grad(grad, x, weight[0]), of_x)


def test_a_layer(pool: WorkerPool, tokens: str) -> None:
    """Its gradient is the same where the tokens are split over tp."""
    expected = pool.run(scale_gradients, 1, tiny_config(tokens))[0]
    assert len(expected) == 2 and all(grad.abs().min() > 0 for grad in expected.values())
    for found in pool.run(scale_gradients, 2, tiny_config(tokens, "tp2", **{"parallel.sequence_parallel": True})):
        for name, grad in found.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-9, atol=1e-14)
