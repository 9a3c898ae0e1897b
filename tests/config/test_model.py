"""The description of a model is what is built."""

from math import prod

import pytest

from megapar.cli.compose import CONF, compose, split
from megapar.config.derive import resolve
from megapar.config.model import parts
from megapar.mesh import Mesh
from megapar.models.stage import TransformerStage
from megapar.parallel.context import StageContext


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
@pytest.mark.parametrize("changes", [[], ["model.bias=true", "model.norm=layernorm", "model.tied=true"]])
def test_records_hold_what_parts_say(name: str, changes: list[str]) -> None:
    """Every part built alone, without memory: its records have as many elements as the part has weights."""
    config = resolve(compose("train", split([f"model={name}", *changes])), vocab_size=1000)
    whole = parts(config)
    decoder = ["embedding", *["layer"] * config.model.layers, "head"]
    model = config.model
    encoders: list[str] = []
    for one, end in ((model.image, "projector"), (model.audio, "projector"), (model.encoder, "norm")):
        encoders += ["embedding", *["layer"] * one.layers, end] if one.layers else []
    assert [part.kind for part in whole] == encoders + decoder
    assert len({part.name for part in whole}) == len(whole)
    for part in [part for part in whole if part.kind != "layer" or part.name.endswith(".0")]:
        context = StageContext(Mesh())
        for tie in part.ties:
            context.tie(tie, [0])
        TransformerStage(context, config, [part])
        records = [piece.record for parameter in context.parameters for piece in parameter.pieces]
        assert sum(prod(record.shape) for record in records) == part.weights
        assert sum(prod(record.shape) for record in records if record.tie) == part.tied
