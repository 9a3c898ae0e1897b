"""The same lines in every layout: the losses and weights of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import megapar
from megapar.config.layout import Layout
from megapar.launch.pool import WorkerPool
from tests.library.models import batch, distance, ours
from tests.library.test_gradients import loss_of

RELATIVE = 1e-12


def ten_lines(style: str, layout: str, kind: str, values: dict[str, Any]) -> tuple[list[float], megapar.Model]:
    model = ours(style, layout=layout, **values)
    stock = kind == "torch's AdamW"
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2) if stock else getattr(megapar, kind)(model, lr=1e-2)
    losses = []
    for step in range(5):
        ids, labels = batch(samples=16)
        labels[step, 2:] = -100
        optimizer.zero_grad()
        losses.append(model.forward_backward(ids, labels, microbatches=4).item())
        optimizer.step()
    return losses, model


def in_a_rank(rank: int, world_size: int, *lines: Any) -> tuple[list[float], dict[str, Any], float]:
    """The losses, this rank's weights with their places, and the loss of an evaluation."""
    losses, model = ten_lines(*lines)
    held = {
        h.piece.record.name: (h.piece.shard.box, w.clone())
        for h, w in zip(model.part.buffers.held(), model.weights().values(), strict=True)
    }
    evaluated = model.evaluate(*batch(9, samples=16)).item()
    model.close()
    return losses, held, evaluated


CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "tp2dp2": ("llama", "tp2dp2", "AdamW", {"kv_heads": 1}),
    "pp2": ("llama tied", "pp2", "AdamW", {"dropout": 0.1}),
    "tp2pp2": ("gpt2", "tp2pp2", "AdamW", {"dropout": 0.1}),
    "pp2 zbv": ("gpt2 untied", "pp2", "AdamW", {"schedule": "zbv", "layers": 4}),
    "tp2dp2, Muon": ("llama", "tp2dp2", "Muon", {}),
    "tp2dp2, torch's AdamW": ("llama tied", "tp2dp2", "torch's AdamW", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process(case: str, pool: WorkerPool) -> None:
    style, layout, kind, values = CASES[case]
    one = {key: value for key, value in values.items() if key != "schedule"}
    expected, model = ten_lines(style, "single", kind, one)
    assert expected[-1] < expected[0]
    weights = model.weights()
    for losses, held, evaluated in pool.run(in_a_rank, Layout.parse(layout).world, style, layout, kind, values):
        assert losses == pytest.approx(expected, rel=RELATIVE)
        assert evaluated == pytest.approx(model.evaluate(*batch(9, samples=16)).item(), rel=RELATIVE)
        for name, (box, values_here) in held.items():
            if not name.endswith("attention.k.bias"):  # its gradient is rounding, which AdamW blows up
                assert distance({name: values_here}, {name: weights[name][box]}) < 1e3 * RELATIVE


def test_one_process_has_both_ways() -> None:
    model, other = ours(), ours()
    ids, labels = batch(samples=8)
    loss = loss_of(other, ids, labels)
    loss.backward()
    for microbatches in (1, 4):
        found = model.forward_backward(ids, labels, microbatches=microbatches).item()
        assert found == pytest.approx(loss.item(), rel=RELATIVE)
        for name, parameter in model.named_parameters():
            assert distance({name: parameter.grad}, {name: other.get_parameter(name).grad}) < RELATIVE  # type: ignore[dict-item]
    loss_of(model, ids, labels).backward()  # adds to it
    name = "head.logits.weight"
    assert distance({name: model.get_parameter(name).grad}, {name: 2 * other.get_parameter(name).grad}) < RELATIVE  # type: ignore


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)


def own_loss(rank: int, world_size: int, layout: str) -> tuple[list[float], Tensor | None]:
    model = ours(layout=layout)
    optimizer = megapar.AdamW(model, lr=1e-2)
    losses = []
    for step in range(3):
        losses.append(model.forward_backward(*batch(step, samples=8), microbatches=2, loss_fn=smoothed).item())
        optimizer.step()
    logits = model(batch()[0]).detach() if "pp" not in layout else None
    model.close()
    return losses, logits


@pytest.mark.parametrize("layout", ["tp2dp2", "pp2"])
def test_a_loss_of_ones_own_and_gathered_logits(layout: str, pool: WorkerPool) -> None:
    expected, logits = own_loss(0, 1, "single")
    assert logits is not None
    for losses, gathered in pool.run(own_loss, Layout.parse(layout).world, layout):
        assert losses == pytest.approx(expected, rel=RELATIVE)
        assert gathered is None or distance({"": gathered}, {"": logits}) < 1e3 * RELATIVE


def plain_backward() -> None:
    loss_of(ours(layout="dp2"), *batch()).backward()


def forward_of_a_stage() -> None:
    ours(layout="pp2")(batch()[0])


def odd_batch() -> None:
    ours(layout="dp2").forward_backward(*batch(samples=3))


def few_microbatches() -> None:
    ours(layout="pp2", schedule="dualpipe_v", layers=4).forward_backward(*batch(), microbatches=1)


def copied() -> None:
    ours(layout="dp2").__deepcopy__({})


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a backward of its own": (plain_backward, "call model.forward_backward(ids, labels)"),
    "the logits of a stage": (forward_of_a_stage, "use model.forward_backward"),
    "a batch that does not divide": (odd_batch, "3 samples don't divide into 1 micro-batches on each of 2 dp ranks"),
    "too few micro-batches": (few_microbatches, "microbatches=1: dualpipe_v"),
    "a layout of another size": (lambda: ours(layout="dp4"), "layout=dp4: has 4 ranks, and 2 were started"),
    "a copy": (copied, "works with layout='single' alone"),
}


def refused(rank: int, world_size: int, what: str) -> str:
    try:
        REFUSED[what][0]()
    except (megapar.UserError, ValueError) as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_part_can_not_do_says_what_does(what: str, pool: WorkerPool) -> None:
    for line in pool.run(refused, 2, what):
        assert REFUSED[what][1] in line and "\n" not in line


PROMPTS = [[3, 1, 4], [5, 9, 2, 6, 5], [1]]


def written(rank: int, world_size: int, layout: str) -> list[list[list[int]]]:
    """The likeliest tokens, longer than what the model was trained on; drawn ones; after a step of training."""
    model = ours("llama", layout=layout)
    found = [*model.generate(PROMPTS, max_tokens=12)]
    found += model.generate(PROMPTS, max_tokens=6, temperature=1.5, top_k=20, seed=4)
    model.forward_backward(*batch(samples=16), microbatches=4)
    megapar.AdamW(model, lr=1e-2).step()
    found += model.generate(PROMPTS[:1], max_tokens=6)
    model.close()
    return [found]


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_texts_are_those_of_one_process(layout: str, pool: WorkerPool) -> None:
    [expected] = written(0, 1, "single")
    assert [len(text) for text in expected] == [12] * 3 + [6] * 4
    for found in pool.run(written, 2, layout):
        assert found == [expected]


def test_a_text_is_what_the_model_says_next() -> None:
    model = ours("llama")
    text = [3, 1, 4]
    for token in model.generate([text], max_tokens=5)[0]:
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text = [*text, token]
    whole = text[3:]
    assert model.generate([text[:3]], max_tokens=5, end_of_text=whole[2]) == [whole[: whole.index(whole[2])]]
    assert model.generate([]) == []
    for prompts, problem in (([[1], []], "prompt 1 is empty"), ([[61]], "an id that is none of 0 to 60")):
        with pytest.raises(ValueError, match=problem):
            model.generate(prompts)
    with pytest.raises(megapar.ConfigError, match=r"max_tokens=0: "):
        model.generate([[1]], max_tokens=0)
