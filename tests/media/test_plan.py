"""What is foreseen of a model of images and sound: what a rank holds and sends, weights, costs."""

from typing import Any

import pytest

from megapar.config.keys import changed
from megapar.config.model import medium_flops, model_weights, parts
from megapar.config.schema import TrainConfig
from megapar.config.stages import stage_parts
from megapar.data.media.decode import image_size
from megapar.data.sources.media import _tokens_of_media
from megapar.part import ModelPart
from tests.media.samples import CLASSES, CLASSIFIES, MODEL, WRITES, prepared, sample
from tests.plan.test_plan import compare_with_steps
from tests.tiny import tiny_config

SP = {"parallel.sequence_parallel": True}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "tp2pp2_sp": (CLASSIFIES, "tp2pp2", SP),
    "tp2_full": (WRITES, "tp2", {"train.recompute": "full"}),
    "tp2_sp": (WRITES, "tp2", SP),
    "pp4": (WRITES, "pp4", {}),
    "pp3_apart": (CLASSIFIES, "pp3", {"pipeline.partition": {"image": [2], "audio": [1], "trunk": [2]}}),
    "dp2_zero": (CLASSIFIES, "dp2", {"parallel.zero": 1}),
    "tp2pp2_lora": (WRITES, "tp2pp2", {"model.lora.rank": 2}),
}


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Samples that all have the same sizes, so that counts are of what every micro-batch has."""
    found = sample(1)
    files = {name: data for name, data in found.items() if name in ("0.png", "0.wav", "txt", "cls", "target.txt")}
    keys = prepared(tmp_path_factory.mktemp("alike"), [files | {"cls": one.encode()} for one in CLASSES] * 8)
    lengths = _tokens_of_media(keys["data.prefix"], changed(TrainConfig(), MODEL).model)
    assert lengths["image"] == height_and_width(files["0.png"]) // 4 and lengths["audio"] > 1
    return keys | {f"train.{name}_length": length for name, length in lengths.items()}


def height_and_width(data: bytes) -> int:
    height, width = image_size(data)
    return height * width


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_what_a_rank_holds_and_sends(case: str, alike: dict[str, Any]) -> None:
    task, layout, values = CASES[case]
    compare_with_steps(tiny_config(alike["data.prefix"], layout, **alike | task | values))


@pytest.mark.parametrize("task", [CLASSIFIES, WRITES], ids=["classifies", "writes"])
@pytest.mark.parametrize("more", [{}, {"model.lora.rank": 2}, {"model.norm": "layernorm", "model.bias": True}])
def test_weights_are_counted(task: dict[str, Any], more: dict[str, Any], media: dict[str, Any]) -> None:
    config = tiny_config(media["data.prefix"], **media | task | more)
    part = ModelPart(changed(config, {"model.lora.rank": 0}), 0)
    adapters = sum(one.adapters for one in parts(config))
    assert model_weights(config) - adapters == sum(parameter.numel for parameter in part.context.parameters)
    part.close()


def test_costs_of_encoders(media: dict[str, Any]) -> None:
    """FLOPs by hand: encoders 24 and 12 wide, ffn 36 and 24 with a gate; 6 and 3 tokens a sample, of 36; hidden 16."""
    lengths = {"train.image_length": 6, "train.audio_length": 3}
    config = tiny_config(media["data.prefix"], "pp2", **media | WRITES | lengths)
    by_name = {part.name: part for part in parts(config)}
    for name, hidden, ffn, inputs, tokens, layers in (("image", 24, 36, 4, 6, 2), ("audio", 12, 24, 10, 3, 1)):
        matrices, projector = 4 * hidden**2 + 3 * hidden * ffn, 16 * (hidden + 16)
        layer, ends = by_name[f"{name}.layers.0"], (by_name[f"{name}.embedding"], by_name[f"{name}.projector"])
        assert layer.matmul * 36 == pytest.approx(2 * matrices * tokens)
        assert layer.attention * 36 == pytest.approx(4 * hidden * tokens**2)
        assert [end.matmul * 36 for end in ends] == pytest.approx(
            [2 * hidden * inputs * tokens, 2 * projector * tokens]
        )
        products = 2 * (layers * matrices + hidden * inputs + projector) * tokens
        assert medium_flops(config.model, name, [tokens]) == pytest.approx(products + 4 * layers * hidden * tokens**2)


def test_where_stages_are_cut(media: dict[str, Any]) -> None:
    """Streams of encoders go as far as the trunk's embedding."""
    values = media | WRITES | {"pipeline.partition": {"image": [2], "audio": [1], "trunk": [1, 1]}}
    stages = stage_parts(tiny_config(media["data.prefix"], "pp4", **values))
    assert [[part.name for part in stage] for stage in stages] == [
        ["image.embedding", "image.layers.0", "image.layers.1", "image.projector"],
        ["audio.embedding", "audio.layers.0", "audio.projector"],
        ["embedding", "layers.0"],
        ["layers.1", "head"],
    ]
    inside = stage_parts(tiny_config(media["data.prefix"], "pp3", **values | {"pipeline.partition": [1, 3, 1]}))
    received = [part.receives for part in (*(stage[0] for stage in stages), inside[1][0])]
    assert received == [(), ("image_tokens",), ("image_tokens", "audio_tokens"), ("hidden",), ("image",)]
