"""Every rule in one process against its formula, written here for one logical weight at a time, with torch alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megapar.config.errors import UserError
from megapar.config.schema import PartOptions, TrainConfig
from megapar.models.stage import build_stage
from megapar.optim.optimizer import Treatment
from megapar.parallel.context import StageContext
from megapar.train.trainer import Trainer
from megapar.update_rules import optimizer_kind, optimizer_names
from megapar.update_rules.muon import orthogonal, scaled
from tests.tiny import GPT2, tiny_config

# Three steps in fp64: rounding reaches 1e-14 of the largest weight, as Newton-Schulz makes a matrix's small singular
# values 485 times as large.
TOLERANCE = 1e-12


@dataclass
class Weight:
    """A logical weight as a formula sees it. part: of the model; state: whatever the formula keeps."""

    value: Tensor
    part: str
    state: dict[str, Tensor] = field(default_factory=dict)

    def moment(self, name: str) -> Tensor:
        return self.state.setdefault(name, torch.zeros_like(self.value))


def adamw(weight: Weight, g: Tensor, lr: float, decay: float, step: int) -> None:
    m, v = weight.moment("m"), weight.moment("v")
    m.mul_(0.9).add_(0.1 * g)
    v.mul_(0.95).add_(0.05 * g * g)
    direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    weight.value -= lr * (direction + decay * weight.value)


def lion(weight: Weight, g: Tensor, lr: float, decay: float, step: int) -> None:
    m = weight.moment("m")
    direction = torch.sign(0.9 * m + 0.1 * g)
    m.mul_(0.95).add_(0.05 * g)
    weight.value -= lr * (direction + decay * weight.value)


def muon(weight: Weight, g: Tensor, lr: float, decay: float, step: int) -> None:
    if weight.value.ndim != 2 or not weight.part.startswith("layers"):
        return adamw(weight, g, lr, decay, step)
    m = weight.moment("m")  # as in Jordan's: a sum, not an average; what is made orthogonal has no scale
    m.mul_(0.95).add_(g)
    x = g + 0.95 * m
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T  # whichever side is longer: the polynomial is one of the singular values alone
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    weight.value -= lr * (0.2 * max(g.shape) ** 0.5 * x + decay * weight.value)
    return None


FORMULAS: dict[str, Callable[[Weight, Tensor, float, float, int], None]] = {"adamw": adamw, "lion": lion, "muon": muon}
GROUPS = {
    "embedding": PartOptions(lr_scale=0.25),
    "layers.[1-9]": PartOptions(weight_decay=0.5),
    "*": PartOptions(lr_scale=0.0),  # the first that matches counts
    "layers.0": PartOptions(lr_scale=3.0),
}


def test_every_rule_has_a_formula() -> None:
    assert FORMULAS.keys() == set(optimizer_names())
    assert all(optimizer_kind(name).name == name for name in FORMULAS)


def part_of(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.startswith("layers") else "embedding" if "embed" in name else "head"


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_rule_is_its_formula(name: str, groups: bool, tokens: str) -> None:
    values: dict[str, Any] = {"optim.name": name, "optim.min_lr": 1.0, "optim.groups": GROUPS if groups else None}
    trainer = Trainer(tiny_config(tokens, **values), 0)
    buffers = trainer.buffers

    def logical(buckets: list[Tensor]) -> dict[str, Tensor]:
        return {held.piece.record.name: held.view(buckets).clone() for held in buffers.held()}

    weights = {key: Weight(value, part_of(key)) for key, value in logical(buffers.params).items()}
    first = {key: weight.value.clone() for key, weight in weights.items()}
    own = {"embedding": (0.25, 0.1), "layers.1": (1.0, 0.5)}
    for step in (1, 2, 3):
        gradients: dict[str, Tensor] = {}
        norm = trainer.step(step, lambda: gradients.update(logical(trainer.sync.owned))).result.grad_norm  # noqa: B023
        for key, weight in weights.items():
            scale, decay = own.get(weight.part, (0.0, 0.1)) if groups else (1.0, 0.1)
            gradient = gradients[key] * min(1.0, 1.0 / (norm + 1e-6))
            FORMULAS[name](weight, gradient, scale * 1e-2, decay if weight.value.ndim == 2 else 0.0, step)
        for key, found in logical(buffers.params).items():
            expected = weights[key].value
            assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max(), (step, key)
    if groups:  # a rate of nothing keeps a value bit for bit
        assert torch.equal(logical(buffers.params)["head.weight"], first["head.weight"])
        assert torch.equal(logical(buffers.params)["layers.0.mlp.up.weight"], first["layers.0.mlp.up.weight"])
    trainer.close()


def test_muon_is_torchs(tokens: str) -> None:
    """torch.optim.Muon's own iteration runs in bf16, which leaves about two digits of a direction."""
    values: dict[str, Any] = {"optim.name": "muon", "train.dtype": "fp32", "optim.clip_grad": 0.0}
    trainer = Trainer(tiny_config(tokens, **values), 0)
    name = "layers.0.attention.k.weight"
    [held] = [held for held in trainer.buffers.held() if held.piece.record.name == name]
    theirs = torch.nn.Parameter(held.view(trainer.buffers.params).clone())
    optimizer = torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    before = theirs.detach().clone()

    def take() -> None:
        theirs.grad = held.view(trainer.sync.owned).clone()

    lr = trainer.step(1, take).lr
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    ours = held.view(trainer.buffers.params)
    assert (ours - theirs).norm() <= 2e-2 * (theirs - before).norm()
    trainer.close()


def test_a_matrix_of_zeros_stays_one() -> None:
    assert torch.equal(scaled(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(8, 8), (5, 40), (40, 5)])
def test_singular_values_are_about_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape).double()))
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_tied_weight_belongs_to_the_first_part(tokens: str) -> None:
    """Its embedding's rate is nothing, so it stays where it is, though the head's is not."""
    values: dict[str, Any] = GPT2 | {"optim.groups": {"embedding": PartOptions(lr_scale=0.0)}}
    trainer = Trainer(tiny_config(tokens, **values), 0)
    [tied] = [local.tensor for local in trainer.context.parameters if local.tie]
    before = tied.detach().clone()
    trainer.step(1)
    assert torch.equal(tied, before)
    trainer.close()


def test_what_belongs_to_no_part_can_not_be_told_apart(tokens: str) -> None:
    """A module of a user's own behind a layer: by part it has no options, and without groups it goes by AdamW."""

    def with_linear(config: TrainConfig, context: StageContext) -> Any:
        stage: Any = build_stage(config, context)
        stage.extra = nn.Linear(3, 5, bias=False, dtype=torch.float64)
        return stage

    values: dict[str, Any] = {"optim.name": "muon", "parallel.check_gradients": False}
    trainer = Trainer(tiny_config(tokens, **values), 0, with_linear)
    [extra] = [held for held in trainer.buffers.held() if held.piece.record.name == "extra.weight"]
    assert Treatment.of(extra, trainer.config.optim).rule == "adamw"
    trainer.close()
    with pytest.raises(UserError, match=r"extra.weight belongs to no part .* context.part"):
        Trainer(tiny_config(tokens, **(values | {"optim.groups": GROUPS})), 0, with_linear)
