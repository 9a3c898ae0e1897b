"""What is seen at a site is the same in every layout, values and gradients, while a model trains and while it writes.

fp64. Where only the samples or the layers are divided every operation is that of one process, so tensors are equal bit
for bit. Where tensor parallelism cuts a sum in two they differ by its rounding, 1e-16 of what is added up: 1e-12 of the
largest value leaves room for what layers make of it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import megapar
from megapar.config.errors import ConfigError, UserError
from megapar.config.layout import Layout
from megapar.config.run_schema import SampleConfig
from megapar.config.schema import TrainConfig
from megapar.config.sites import OF_LAYERS
from megapar.generate.tokens import Generator
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.encoder_decoder.pairs import FAMILIES
from tests.library.models import batch, ours
from tests.media.samples import CLASSIFIES
from tests.tiny import tiny_config

SITES = ["embedding", "norm", "logits", "layers.0", "layers.1"]
SITES += [f"layers.{index}.{kind}" for index in (0, 1) for kind in OF_LAYERS if kind and not kind.startswith("cross.")]
LAYOUTS: dict[str, tuple[str, dict[str, Any], float]] = {
    "dp2": ("dp2", {}, 0.0),
    "pp2": ("pp2", {}, 0.0),
    "pp2, the head alone": ("pp2", {"layers": 2}, 0.0),
    "tp2": ("tp2", {}, 1e-12),
    "tp2pp2dp2": ("tp2pp2dp2", {}, 1e-12),
    "tp4, copies of a key head": ("tp4", {"kv_heads": 2}, 1e-12),
}


def seen_in(layout: str, values: dict[str, Any], microbatches: int = 2) -> dict[str, Tensor]:
    model = ours("llama", layout=layout, **values)
    ids, labels = batch(samples=8)
    with megapar.capture(model, SITES, gradients=True) as seen:
        model.forward_backward(ids, labels, microbatches=microbatches)
    names = [*SITES, *(f"{name}.gradient" for name in SITES if not name.endswith("weights"))]
    found = {name: seen[name] for name in names}
    model.close()
    return found


def rank_sees(rank: int, world_size: int, layout: str, values: dict[str, Any]) -> dict[str, Tensor]:
    return seen_in(layout, values)


@pytest.mark.parametrize("case", LAYOUTS)
def test_every_rank_sees_what_one_process_does(pool: WorkerPool, case: str) -> None:
    layout, values, bound = LAYOUTS[case]
    ranks = Layout.parse(layout)
    expected = seen_in("single", values, 2 * ranks["dp"])  # micro-batches of the same samples
    for found in pool.run(rank_sees, ranks.world, layout, values):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].shape == tensor.shape, name
            distance = float((found[name] - tensor).abs().max() / tensor.abs().max())
            assert distance <= bound, f"{name}: {distance}"


def seen_in_steps(rank: int, world_size: int, config: TrainConfig, sites: list[str]) -> dict[str, Tensor]:
    trainer = Trainer(config, rank)
    with megapar.capture(trainer, sites) as seen:
        trainer.step(1)
    found = {name: seen[name] for name in sites}
    trainer.close()
    return found


def alike(pool: WorkerPool, sites: list[str], prefix: str, layouts: dict[str, dict[str, Any]], values: Any) -> None:
    [expected] = pool.run(seen_in_steps, 1, tiny_config(prefix, **values), sites)
    for layout, more in layouts.items():
        config = tiny_config(prefix, layout, **values | more)
        for found in pool.run(seen_in_steps, config.parallel.layout.world, config, sites):
            for name, tensor in expected.items():
                assert found[name].shape == tensor.shape and tensor.abs().max() > 0, f"{layout}: {name}"
                distance = float((found[name] - tensor).abs().max() / tensor.abs().max())
                assert distance < 1e-12, f"{layout}: {name}: {distance}"


def test_an_encoder_beside_a_decoder(pool: WorkerPool, pairs: dict[str, Any]) -> None:
    sites = ["encoder.embedding", "encoder.layers.1", "encoder.layers.0.attention.weights", "layers.1.cross.heads"]
    sites += ["layers.0.cross.out", "encoder.layers.1.mlp.inner", "layers.1.attention.weights", "embedding", "logits"]
    for family in ("t5_gated", "vaswani"):
        layouts: dict[str, dict[str, Any]] = {"tp2": SPLIT, "pp4": {}} if family == "t5_gated" else {"pp2": {}}
        alike(pool, sites, pairs["data.prefix"], layouts, pairs | FAMILIES[family])


def test_encoders_of_images_and_sound(pool: WorkerPool, media: dict[str, Any]) -> None:
    sites = ["image.layers.0", "image.layers.1.attention.heads", "audio.layers.0.mlp.inner", "layers.1", "embedding"]
    alike(pool, sites, media["data.prefix"], {"tp2": SPLIT, "pp3": {}}, media | CLASSIFIES)


SPLIT: dict[str, Any] = {"parallel.sequence_parallel": True}


def test_training_with_everything_on(pool: WorkerPool, tokens: str) -> None:
    """Sequence parallelism, layers computed again in backward, dropout, documents that don't see each other."""
    expected = trained(pool, tokens, "single")
    assert (expected["layers.0.attention.weights"][:, 1:, :, 0] == 0).any(), "no document begins in a sample"
    for layout in ("tp2", "tp2pp2"):
        found = trained(pool, tokens, layout, **SPLIT)
        for name, tensor in expected.items():
            assert float((found[name] - tensor).abs().max() / tensor.abs().max()) < 1e-12, f"{layout}: {name}"


def trained(pool: WorkerPool, tokens: str, layout: str, **values: Any) -> dict[str, Tensor]:
    """What passed in the second step, the same on every rank."""
    more = {
        "train.recompute": "full",
        "model.dropout": 0.1,
        "data.document_mask": True,
        "train.seq_length": 24,
    } | values
    config = tiny_config(tokens, layout, **more)
    found = pool.run(steps, config.parallel.layout.world, config)
    for one in found[1:]:
        assert all(torch.equal(one[name], tensor) for name, tensor in found[0].items())
    return found[0]


def steps(rank: int, world_size: int, config: TrainConfig) -> dict[str, Tensor]:
    trainer = Trainer(config, rank)
    with megapar.capture(trainer, SITES, gradients=True) as seen:
        trainer.step(1)
        seen.clear()
        trainer.step(2)
    assert hooks(trainer) == 0
    found = {name: seen[name] for name in ("layers.0", "layers.1.mlp.inner", "layers.0.attention.weights", "logits")}
    found |= {f"{name}.gradient": seen[f"{name}.gradient"] for name in ("layers.0", "layers.1.mlp.inner", "logits")}
    trainer.close()
    return found


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "gpt2": ("gpt2", {}),
    "a window": ("llama", {"window": 3}),
    "a cap": ("llama", {"attention_softcap": 0.5, "attention_scale": 3.0}),
    "norms of heads": ("llama", {"qk_norm": "head"}),
    "relative positions": ("llama", {"position": "relative", "relative_buckets": 4, "relative_distance": 5}),
    "to both sides": ("llama", {"causal": False, "output": "mlm"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_by_which_heads_read(kind: str) -> None:
    """What a head reads is the sum of what it sees, by weights that are computed beside the pass."""
    style, values = KINDS[kind]
    model, (ids, _) = ours(style, init_std=0.5, **values), batch()
    sites = [f"layers.1.attention.{name}" for name in ("weights", "v", "heads")]
    with megapar.capture(model, sites) as seen:
        model(ids)
    weights, v, heads = (seen[name] for name in sites)
    v = v.repeat_interleave(heads.shape[2] // v.shape[2], 2)
    torch.testing.assert_close(torch.einsum("bsnk,bknd->bsnd", weights, v), heads, rtol=0, atol=1e-12)
    assert weights.std() > 0.01, "all weights are alike"


def hooks(trainer: Any) -> int:
    """On all modules of a rank: without one torch calls a module's forward at once."""
    modules = [module for stage in trainer.stages.values() for module in stage.modules()]
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


def test_nothing_is_paid_when_off(tokens: str) -> None:
    trainer = Trainer(tiny_config(tokens), 0)
    assert hooks(trainer) == 0
    with megapar.capture(trainer, ["layers.0"]):
        assert hooks(trainer) > 0
    assert hooks(trainer) == 0
    trainer.close()


def writes(rank: int, world_size: int, config: TrainConfig) -> dict[str, Tensor]:
    trainer = Trainer(config, rank)
    made = Generator.of(config, trainer.stages, trainer.context, texts=2)
    texts = [
        made.text([3, 1, 4], SampleConfig(max_tokens=3, temperature=0.0)),
        made.text([5, 9], SampleConfig(max_tokens=4)),
    ]
    sites = ["layers.0", "layers.1.attention.heads", "layers.1.attention.k", "layers.1.attention.weights"]
    sites += ["norm", "logits"]
    with megapar.capture(trainer, sites) as seen:
        list(made.write(texts))
    found = {name: seen[name] for name in sites}
    trainer.close()
    return found | {"text": torch.tensor(texts[0].tokens)}


def test_texts_that_are_written(pool: WorkerPool, tokens: str) -> None:
    """Of a text is seen what one pass over the whole of it shows, to rounding."""
    [expected] = pool.run(writes, 1, tiny_config(tokens))
    trainer = Trainer(tiny_config(tokens), 0)
    ids = expected.pop("text")[None, :5]
    tokens_of = {"ids": ids, "samples": torch.zeros(1).long(), "step": torch.tensor(0)}
    once = ["layers.1.attention.heads", "layers.1.attention.weights", "layers.1.attention.k"]
    with megapar.capture(trainer, once) as seen, torch.no_grad():
        trainer.stages[0]({}, tokens_of)
    for name in once:
        found = expected[name][0, :5]
        found = found[..., :5] if name.endswith("weights") else found
        torch.testing.assert_close(found, seen[name][0], rtol=0, atol=1e-12)
    trainer.close()
    for layout, more in (("tp2", SPLIT), ("pp2", {})):
        config = tiny_config(tokens, layout, **more)
        for found in pool.run(writes, 2, config):
            for name, tensor in expected.items():
                assert float((found[name] - tensor).abs().max() / tensor.abs().max()) < 1e-12, f"{layout}: {name}"


def test_what_is_refused(tokens: str) -> None:
    model = ours("llama")
    for site, problem in (
        (
            "layers.2",
            r"there are embedding, norm, logits, layers.0 to layers.1, and places in a layer such as layers.0.att",
        ),
        ("layers.1.attention.head", r"this layer .*, layers.1.mlp.out; did you mean layers.1.attention.heads\?$"),
        ("layers.1.cross.out", r"this layer has layers.1, layers.1.attention.q"),
        ("encoder.layers.0", r"there are embedding"),
        ("", r"there are embedding"),
    ):
        with pytest.raises(ConfigError, match=rf"^sites={site}: no such place; {problem}"):
            megapar.capture(model, [site])
    for names in ("layers.1", [1]):
        with pytest.raises(ConfigError, match=r"give a list of names, such as"):
            megapar.capture(model, names)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"sites: a Linear is no model of megapar.build"):
        megapar.capture(torch.nn.Linear(2, 2), ["layers.0"])
    with megapar.capture(model, ["layers.0"]) as seen, pytest.raises(UserError, match=r"is entered already"), seen:
        pass
    with pytest.raises(KeyError, match=r"layers.0: nothing has passed; captured are layers.0"):
        seen["layers.0"]
    with pytest.raises(KeyError, match=r"layers.1: "):
        seen["layers.1"]


def test_a_shorter_text_is_all_there_is() -> None:
    """The same sample again, of which nothing is left from before: neither places nor, of weights, keys."""
    model, (ids, _) = ours("llama"), batch(samples=2)
    sites = ["layers.0", "layers.1.attention.weights"]
    with megapar.capture(model, sites) as expected:
        model(ids[:1, :5])
    with megapar.capture(model, sites) as seen:
        model(ids)
        model(ids[:1, :5])
    for site in sites:
        assert not seen[site][0, 5:].any() and seen[site][1, 5:].any()
    assert torch.equal(seen["layers.0"][0, :5], expected["layers.0"][0])
    weights = seen["layers.1.attention.weights"][0, :5]
    assert torch.equal(weights[..., :5], expected["layers.1.attention.weights"][0]) and not weights[..., 5:].any()


def moves(rank: int, world_size: int) -> str:
    """A sample that is dealt to the other rank in the second pass."""
    model = ours("llama", layout="dp2")
    ids, labels = batch(samples=4)
    with megapar.capture(model, ["layers.0"]) as seen:
        model.evaluate(ids, labels, microbatches=1)
        model.evaluate(ids, labels, microbatches=2)
    try:
        seen["layers.0"]
    except UserError as error:
        return str(error)
    finally:
        model.close()
    return ""


def test_passes_that_differ_are_not_mixed(pool: WorkerPool) -> None:
    for said in pool.run(moves, 2):
        assert said.startswith("layers.0: a sample has passed on several ranks; call seen.clear()")
