"""A plain loop with torch's own optimizer trains a library model as it trains a plain torch module."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megapar
from tests.library.models import STYLES, batch, distance, gradients, ours, plain

RELATIVE = 1e-12


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(model: nn.Module, loop: str, steps: int = 5) -> list[float]:
    """Five steps of a loop as people write them. Returns the losses, and the norms where they are clipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    said = []
    for step in range(steps):
        parts = [batch(10 * step + part) for part in range(3 if loop == "accumulate" else 1)]
        if loop == "after the forward":
            loss = loss_of(model, *parts[0])
            optimizer.zero_grad()
            loss.backward()
            said.append(loss.item())
        else:
            optimizer.zero_grad(set_to_none=loop != "zeros")
            for ids, labels in parts:
                loss = loss_of(model, ids, labels)
                loss.backward()
                said.append(loss.item())
        if loop == "clip":
            said.append(nn.utils.clip_grad_norm_(model.parameters(), 0.3).item())
        optimizer.step()
    return said


@pytest.mark.parametrize("style", STYLES)
def test_logits_and_gradients_are_the_references(style: str) -> None:
    model = ours(style)
    other = plain(model)
    for samples, length in ((4, 8), (1, 1), (3, 5)):
        ids, labels = batch(1, samples, length)
        assert distance({"": model(ids)}, {"": other(ids)}) < RELATIVE
        model.zero_grad()
        other.zero_grad()
        loss_of(model, ids, labels).backward()
        loss_of(other, ids, labels).backward()
        theirs, found = gradients_of(other), gradients(model)
        largest = max(gradient.abs().max() for gradient in theirs.values())
        for name, gradient in theirs.items():  # of one token, those of q and k are zero
            assert (found[name] - gradient).abs().max() < RELATIVE * largest, name


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    "loop",
    [
        *(pytest.param(one, marks=pytest.mark.slow) for one in ("none", "zeros", "after the forward")),
        "accumulate",
        "clip",
    ],
)
def test_five_steps_of_torchs_adamw(style: str, loop: str) -> None:
    model = ours(style)
    other = plain(model)
    before = {name: value.clone() for name, value in model.weights().items()}
    assert train(model, loop) == pytest.approx(train(other, loop), rel=RELATIVE)
    found, expected = model.weights(), values_of(other)
    # A bias of k shifts all scores of a query alike: its gradient is zero but for rounding, which AdamW blows up.
    names = [name for name in expected if not name.endswith("attention.k.bias")]
    assert all((found[name] - before[name]).abs().max() > 1e-3 for name in names), "it did not train"
    assert distance({name: found[name] for name in names}, {name: expected[name] for name in names}) < 10 * RELATIVE


def test_grad_is_a_view_of_the_main_gradient() -> None:
    model = ours()
    assert all(parameter.grad is None for parameter in model.parameters())
    loss_of(model, *batch()).backward()
    for local in model.part.context.parameters:
        assert local.tensor.grad is not None and local.tensor.grad.data_ptr() == local.grad.data_ptr()


def test_a_gradient_that_was_put_there_is_added_to() -> None:
    model = ours()
    loss_of(model, *batch()).backward()
    once = gradients(model)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad = 3.0 * parameter.grad
    loss_of(model, *batch()).backward()
    assert distance(gradients(model), {name: 4 * gradient for name, gradient in once.items()}) < RELATIVE


def test_one_parameter_without_a_gradient_starts_from_zero() -> None:
    model = ours()
    loss_of(model, *batch()).backward()
    once = gradients(model)
    cleared = model.get_parameter("layers.0.mlp.up.weight")
    cleared.grad = None
    loss_of(model, *batch()).backward()
    times = {name: 1 if name.startswith("layers.0.mlp.") and "down" not in name else 2 for name in once}
    assert distance(gradients(model), {name: times[name] * gradient for name, gradient in once.items()}) < RELATIVE


def test_frozen_parameters_keep_out() -> None:
    model, free = ours("gpt2 untied"), ours("gpt2 untied")
    for name in ("embedding.tokens.weight", "layers.0.norm1.weight", "layers.1.mlp.down.weight"):
        model.get_parameter(name).requires_grad_(False)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    for one in (model, free):
        loss_of(one, *batch()).backward()
    for name, parameter in model.named_parameters():
        expected = free.get_parameter(name).grad
        assert expected is not None
        assert (parameter.grad is None) if name in frozen else torch.equal(parameter.grad, expected), name  # type: ignore[arg-type]
    train(model, "none")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_a_gradient_from_before_a_freeze_stays() -> None:
    """Of a LayerNorm's weight, whose op has the gradient of its bias to add, too."""
    model = ours("gpt2")
    weight, bias = (model.get_parameter(f"layers.0.norm1.{name}") for name in ("weight", "bias"))
    loss_of(model, *batch()).backward()
    assert weight.grad is not None and bias.grad is not None
    before = weight.grad.clone(), bias.grad.clone()
    weight.requires_grad_(False)
    loss_of(model, *batch()).backward()
    assert torch.equal(weight.grad, before[0]) and not torch.equal(bias.grad, before[1])
    assert not copy.deepcopy(model).get_parameter("layers.0.norm1.weight").requires_grad


def test_a_copy_is_a_model_of_its_own() -> None:
    model = ours()
    loss_of(model, *batch()).backward()
    twin = copy.deepcopy(model)
    assert distance(gradients(twin), gradients(model)) == 0
    before = values_of(model)
    train(twin, "none")
    assert all(torch.equal(value, values_of(model)[name]) for name, value in before.items())
    model.zero_grad()
    train(model, "none")
    assert all(torch.equal(value, values_of(twin)[name]) for name, value in values_of(model).items())


def test_state_goes_into_another_model_and_its_optimizer() -> None:
    model, other = ours("gpt2", dtype="bf16"), ours("gpt2", dtype="bf16", seed=7)
    optimizer = megapar.AdamW(other, lr=1e-9)
    other.load_state_dict(model.state_dict())
    loss_of(other, *batch()).backward()
    optimizer.step()  # from fp32 weights of its own, which must be the new ones
    assert all((value - values_of(model)[name]).abs().max() < 1e-3 for name, value in values_of(other).items())


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("kind", [megapar.AdamW, megapar.Lion, megapar.Muon])
def test_ours_train_every_dtype(kind: Any, dtype: str) -> None:
    model = ours(dtype=dtype)
    optimizer = kind(model, lr=1e-2)
    losses = []
    for _ in range(8):
        loss = loss_of(model, *batch())
        optimizer.zero_grad()
        loss.backward()
        assert optimizer.step().grad_norm > 0
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_our_adamw_accumulates_and_starts_anew_in_bf16() -> None:
    model = ours(dtype="bf16")
    optimizer = megapar.AdamW(model, lr=1e-9, clip_grad=0.0)
    norms = []
    for times in (1, 2, 1):
        optimizer.zero_grad()
        for _ in range(times):
            loss_of(model, *batch()).backward()
        norms.append(optimizer.step().grad_norm)
    assert norms[1] == pytest.approx(2 * norms[0], rel=1e-2) and norms[2] == pytest.approx(norms[0], rel=1e-2)


def bf16_backward() -> None:
    model = ours(dtype="bf16")
    torch.optim.AdamW(model.parameters())
    loss_of(model, *batch()).backward()


def bf16_step() -> None:
    ours(dtype="bf16").forward_backward(*batch())


def step_without_gradients() -> None:
    megapar.AdamW(ours()).step()


def frozen_step() -> None:
    model = ours()
    model.embedding.requires_grad_(False)  # type: ignore[union-attr]
    loss_of(model, *batch()).backward()
    megapar.AdamW(model).step()


def second_derivative() -> None:
    loss_of(ours(), *batch()).backward(create_graph=True)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "stock optimizer in bf16": (bf16_backward, "megapar.AdamW(model, lr=...)"),
    "bf16 without an optimizer": (bf16_step, "megapar.AdamW(model, lr=...)"),
    "step without gradients": (step_without_gradients, "call loss.backward()"),
    "frozen": (frozen_step, "embedding.weight is frozen"),
    "second derivative": (second_derivative, "create_graph"),
    "another dtype": (lambda: ours().bfloat16(), "build the model anew"),
    "assign": (lambda: ours().load_state_dict({}, assign=True), "leave out assign=True"),
    "pickle": (lambda: torch.save(ours(), io.BytesIO()), "model.state_dict()"),
    "another module": (lambda: megapar.AdamW(nn.Linear(1, 1)), "torch.optim.AdamW"),  # type: ignore[arg-type]
    "learning rate": (lambda: megapar.AdamW(ours(), lr=-1.0), "optim.lr=-1.0: must be more than 0"),
}


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("what", REFUSED)
def test_what_can_not_work_says_what_does(what: str) -> None:
    do, said = REFUSED[what]
    with pytest.raises(megapar.UserError) as refusal:
        do()
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_what_changes_nothing_is_allowed() -> None:
    model = ours()
    assert model.double().to("cpu") is model


def test_dropout_differs_from_pass_to_pass_and_ends_with_eval() -> None:
    model = ours(dropout=0.2)
    ids, labels = batch()
    assert not torch.equal(model(ids), model(ids))
    first, second = model(ids[:1].repeat(2, 1))
    assert not torch.equal(first, second)
    without = model.eval()(ids)
    assert distance({"": without}, {"": plain(model)(ids)}) < RELATIVE
    model.forward_backward(ids, labels)  # trains, with dropout, and leaves the mode as it was
    assert not model.training and torch.equal(model(ids), without)
    model.train().evaluate(ids, labels)
    assert model.training and not torch.equal(model(ids), model(ids))


def test_hidden_states() -> None:
    model = ours()
    ids, _ = batch(samples=3, length=5)
    logits, hidden = model(ids, hidden=True)
    other = plain(model)
    expected = {"embedding": other.embedding(ids)}
    for number, layer in enumerate(other.layers):
        expected[f"layers.{number}"] = layer([*expected.values()][-1])
    assert distance(hidden, expected) < RELATIVE and torch.equal(logits, model(ids))
