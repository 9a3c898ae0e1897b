"""Patches change what they name and nothing else, alike in every layout; the logit lens is the model's own head."""

from typing import Any

import pytest
import torch
from torch import Tensor

import megapar
from megapar.config.errors import ConfigError, UserError
from megapar.config.layout import Layout
from megapar.launch.pool import WorkerPool
from tests.library.models import batch, ours


def losses(layout: str) -> list[float]:
    """With nothing patched, a head of another run, a head gone, a place's stream that of another sample, the MLP's
    features turned by a function; and the gradient of a weight behind a patch, as a norm."""
    model = ours("llama", layout=layout)
    ids, labels = batch(samples=8)
    others, _ = batch(9, samples=8)
    with megapar.capture(model, ["layers.0.attention.heads", "layers.0"]) as seen:
        model.evaluate(others, labels, microbatches=2)
    heads, stream = seen["layers.0.attention.heads"], seen["layers.0"]
    found = []
    patches: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"layers.0.attention.heads": heads}, {"blocks": [2]}),
        ({"layers.0.attention.heads": 0.0, "layers.1.attention.heads": 0.0}, {"blocks": [3]}),
        ({"layers.0": stream}, {"places": [1, 4]}),
        ({"layers.0": stream.mean((0, 1), keepdim=True)}, {"places": [0]}),
        ({"layers.1.mlp.inner": lambda x, local: x * (local.places + 1)[:, None, None]}, {"blocks": [0, 30]}),
        ({"layers.0.attention.v": 0.5, "logits": lambda x, local: 2 * x}, {}),
    ]
    for values, chosen in patches:
        with megapar.patch(model, values, **chosen):
            found.append(model.evaluate(ids, labels, microbatches=2).item())
    with megapar.patch(model, {"layers.1.attention.heads": 0.0}, blocks=[0]):
        model.forward_backward(ids, labels, microbatches=2)
    gradients = [local.tensor.grad for local in model.part.context.parameters]
    total = sum((grad.double().square().sum() for grad in gradients if grad is not None), torch.zeros(()).double())
    model.close()
    return [*found, float(total) if layout == "single" else 0.0]


def rank_losses(rank: int, world_size: int, layout: str) -> list[float]:
    return losses(layout)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2", "tp4"])
def test_losses_are_those_of_one_process(pool: WorkerPool, layout: str) -> None:
    expected = losses("single")
    assert len({round(loss, 6) for loss in expected[:-1]}) == len(expected) - 1, "a patch changes nothing"
    for found in pool.run(rank_losses, Layout.parse(layout).world, layout):
        assert found[:-1] == pytest.approx(expected[:-1], rel=1e-12, abs=0)  # fp64: rounding of sums over ranks


def test_only_what_is_named_changes() -> None:
    model, (ids, _) = ours("llama"), batch()
    plain = model(ids)
    with megapar.patch(model, {"layers.0": 0.0}, places=[5]):
        patched = model(ids)
    assert torch.equal(patched[:, :5], plain[:, :5]) and not torch.equal(patched[:, 5], plain[:, 5])
    heads_gone = megapar.patch(model, {"layers.0.attention.heads": 0.0}, blocks=[1, 2])
    with megapar.capture(model, ["layers.0.attention.heads", "layers.0.attention.out"]) as seen, heads_gone:
        model(ids)
    heads = seen["layers.0.attention.heads"]  # what came to the site; hooks see each other in the order of their making
    out = heads.clone()
    out[:, :, [1, 2]] = 0.0
    weight = model.weights()["layers.0.attention.out.weight"]
    torch.testing.assert_close(seen["layers.0.attention.out"], out.flatten(2) @ weight.T, rtol=0, atol=1e-12)
    assert torch.equal(model(ids), plain)


def test_a_run_that_is_restored_says_what_it_said() -> None:
    """Of a corrupted run, with the clean one's stream behind a layer put back, everything behind is the clean one's."""
    model, (ids, _) = ours("gpt2"), batch()
    corrupted, _ = batch(5)
    with megapar.capture(model, ["layers.0"]) as seen:
        clean = model(ids)
    with megapar.patch(model, {"layers.0": seen["layers.0"]}):
        assert torch.equal(model(corrupted), clean)


def test_what_is_refused() -> None:
    model, (ids, _) = ours("llama"), batch()
    with pytest.raises(ConfigError, match=r"^patch=layers.0.attention.weights: is not on the way"):
        megapar.patch(model, {"layers.0.attention.weights": 0.0})
    with pytest.raises(ConfigError, match=r"^patch=layers.0: has no heads or features to choose; leave out blocks"):
        megapar.patch(model, {"layers.0": 0.0}, blocks=[0])
    for chosen, problem in (
        ({"blocks": [1, 4]}, r"^patch=layers.0.attention.heads: has blocks 0 to 3, and no 4"),
        ({"blocks": [-1]}, r"^patch=\[-1\]: give blocks as a list of numbers from 0 on"),
        ({"blocks": []}, r"^patch=\[\]: give blocks as a list"),
        ({"blocks": ["3"]}, r"give blocks as a list of numbers"),
        ({"places": [-1]}, r"give places as a list of numbers"),
    ):
        with pytest.raises(ConfigError, match=problem):
            megapar.patch(model, {"layers.0.attention.heads": 0.0}, **chosen)
    for value in ("0", None, [0.0], torch.zeros(1).numpy()):
        with pytest.raises(ConfigError, match=r"^patch=layers.0: a \w+ is no value; give a number, a torch tensor"):
            megapar.patch(model, {"layers.0": value})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"give values by site"):
        megapar.patch(model, ["layers.0"])  # type: ignore[arg-type]
    nowhere = megapar.patch(model, {"layers.0": 0.0}, places=[8])
    with pytest.raises(ConfigError, match=r"no token stood at any of these places"), nowhere:
        model(ids)
    wrong: list[tuple[Any, str]] = [
        (lambda x, local: x[:1], r"its function gives values \[1, 1, 16\]; give .* shape of x, here \[32, 1, 16\]"),
        (lambda x, local: None, r"its function gives a NoneType; give a tensor"),
        (torch.zeros(4, 8, 15), r"has values \[4, 8, 15\]; give \[samples, S, ...\] as `capture` does"),
        (torch.zeros(3, 8, 16), r"has values of 3 samples, and number 3 passes; give all, or 1"),
        (torch.zeros(1, 7, 16), r"has values of 7 places, and number 7 passes; give all, or 1"),
    ]
    for values, problem in wrong:
        patch = megapar.patch(model, {"layers.0": values})
        with pytest.raises(ConfigError, match=rf"^patch=layers.0: {problem}"), patch:
            model(ids)
    with megapar.patch(model, {"layers.0": torch.tensor(0.0)}), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError  # a user's own error is not hidden


def too_few(rank: int, world_size: int) -> str:
    """Values of 2 samples, of which rank 1 has others: only it can know."""
    model = ours("llama", layout="dp2")
    ids, labels = batch(samples=4)
    try:
        with megapar.patch(model, {"layers.0": torch.zeros(2, 8, 16)}):
            model.evaluate(ids, labels, microbatches=1)
    except ConfigError as error:
        return str(error)
    finally:
        model.close()
    return ""


def test_what_one_rank_runs_into_all_ranks_say(pool: WorkerPool) -> None:
    for said in pool.run(too_few, 2):
        assert said.startswith("patch=layers.0: has values of 2 samples, and number 3 passes"), said


def test_the_lens_refuses() -> None:
    model = ours("llama")
    x = torch.zeros(2, 8, 16)
    for streams, top, problem in (
        ([], 5, r"streams none; give \[samples, S, 16\] each"),
        ([x, x[:1]], 5, r"streams \[2, 8, 16\], \[1, 8, 16\]; give"),
        ([x[..., :5]], 5, r"streams \[2, 8, 5\]; give"),
        ([x[0]], 5, r"streams \[8, 16\]; give"),
        ([x], 0, r"top=0; give at least 1"),
        ([x * torch.nan], 5, r"streams, or what the model's head makes of them, are not finite"),
    ):
        with pytest.raises(UserError, match=rf"^logit_lens: {problem}"):
            megapar.logit_lens(model, streams, top=top)
    alike = [megapar.logit_lens(model, [x.to(dtype) + 0.5]).tokens for dtype in (torch.float32, torch.float64)]
    assert torch.equal(*alike)


def lens(layout: str) -> tuple[Tensor, Tensor, Tensor]:
    model = ours("llama", layout=layout)
    ids, labels = batch(samples=8)
    with megapar.capture(model, ["layers.0", "layers.1"]) as seen:
        model.evaluate(ids, labels, microbatches=2)
    found = megapar.logit_lens(model, [seen["layers.0"], seen["layers.1"]], top=3)
    model.close()
    return found.tokens, found.probabilities, found.entropy


def rank_lens(rank: int, world_size: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    return lens(layout)


def test_the_lens_is_the_models_own_head(pool: WorkerPool) -> None:
    model, (ids, _) = ours("llama"), batch(samples=8)
    chances = torch.softmax(model(ids), -1)
    expected = lens("single")
    torch.testing.assert_close(expected[1][1], chances.topk(3, -1).values.detach(), rtol=1e-12, atol=0)
    assert torch.equal(expected[0][1], chances.topk(3, -1).indices)
    torch.testing.assert_close(expected[2][1], -(chances * chances.log()).sum(-1).detach(), rtol=1e-12, atol=0)
    for layout in ("tp2", "pp2", "tp2dp2"):
        for tokens, probabilities, entropy in pool.run(rank_lens, Layout.parse(layout).world, layout):
            assert torch.equal(tokens, expected[0])
            torch.testing.assert_close(probabilities, expected[1], rtol=1e-12, atol=0)
            torch.testing.assert_close(entropy, expected[2], rtol=1e-12, atol=0)
