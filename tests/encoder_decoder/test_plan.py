"""What is foreseen of an encoder-decoder: what a rank holds and sends, weights, costs."""

from typing import Any

import pytest

from megapar.config.model import model_weights, parts
from megapar.config.stages import stage_costs, stage_parts
from megapar.part import ModelPart
from tests.encoder_decoder.pairs import FAMILIES
from tests.plan.test_plan import compare_with_steps
from tests.tiny import tiny_config

SP = {"parallel.sequence_parallel": True}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tp2pp2_sp": ("t5", "tp2pp2", SP),
    "tp2_full": ("t5_gated", "tp2", {"train.recompute": "full"}),
    "pp4": ("modern", "pp4", {}),
    "pp3_inside_the_decoder": ("t5", "pp3", {"pipeline.partition": [1, 2, 1]}),
    "pp2_chunks": ("apart", "pp2", {"pipeline.schedule": "interleaved", "train.micro_batch_size": 1}),
    "dp2_zero": ("vaswani", "dp2", {"parallel.zero": 1}),
    "tp2pp2_lora": ("t5", "tp2pp2", SP | {"model.lora.rank": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_what_a_rank_holds_and_sends(case: str, pairs: dict[str, Any]) -> None:
    family, layout, values = CASES[case]
    compare_with_steps(tiny_config(pairs["data.prefix"], layout, **pairs | FAMILIES[family] | values))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_counted(family: str, pairs: dict[str, Any]) -> None:
    config = tiny_config(pairs["data.prefix"], **pairs | FAMILIES[family])
    part = ModelPart(config, 0)
    assert model_weights(config) == sum(parameter.numel for parameter in part.context.parameters)
    part.close()


def test_where_stages_are_cut(pairs: dict[str, Any]) -> None:
    """An encoder alone on its device sends its output; nothing of the decoder is there."""
    values = pairs | {"model.layers": 6, "pipeline.partition": {"encoder": [2], "decoder": [3, 3]}}
    config = tiny_config(pairs["data.prefix"], "pp3", **values)
    assert config.pipeline.partition == [2, 3, 3]
    names = [[part.name for part in stage] for stage in stage_parts(config)]
    assert names[0] == ["encoder.embedding", "encoder.layers.0", "encoder.layers.1", "encoder.norm"]
    assert names[1] == ["embedding", "layers.0", "layers.1", "layers.2"] and names[2][-1] == "head"
    assert [stage[0].receives for stage in stage_parts(config)] == [(), ("memory",), ("hidden", "memory")]


def test_costs_are_of_both_lengths(pairs: dict[str, Any]) -> None:
    """FLOPs by hand: hidden 16, heads of 4 channels (4 and 2), ffn 32 with a gate, sources of 18 and targets of 12."""
    config = tiny_config(pairs["data.prefix"], "pp2", **pairs | {"pipeline.partition": "balanced"})
    by_name = {part.name: part for part in parts(config)}
    self_attention, mlp = 16 * (16 + 8 + 8) + 16 * 16, 3 * 16 * 32
    encoder, decoder = by_name["encoder.layers.1"], by_name["layers.1"]
    assert encoder.matmul * 12 == pytest.approx(2 * (self_attention + mlp) * 18)
    assert decoder.matmul * 12 == pytest.approx(2 * ((self_attention + mlp + 2 * 16 * 16) * 12 + 16 * 16 * 18))
    assert encoder.attention * 12 == pytest.approx(4 * 16 * 18 * 18)
    assert decoder.attention * 12 == pytest.approx(4 * 16 * 12 * (12 + 18))
    assert len(stage_costs(config).forward) == 2
