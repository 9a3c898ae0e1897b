"""Encoders and decoders that are wrong in one place are seen by the comparison with one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megapar import verify
from megapar.launch.pool import WorkerPool
from megapar.models.cross_attention import CrossAttention
from megapar.models.stage import TransformerStage
from megapar.parallel.grad_sync import GradSync
from tests.encoder_decoder.pairs import FAMILIES
from tests.parallel.layouts import compare, verify_config

run_layout = verify.run_layout


def gradient_of_later_stages_lost(rank: int, world_size: int, *args: Any) -> Any:
    """A stage hands on the memory without a way back."""
    original = TransformerStage.forward

    def forward(self: TransformerStage, received: Any, batch: Any, cache: Any = None) -> Any:
        outputs = original(self, received, batch, cache)
        if "hidden" in outputs and "memory" in outputs:
            outputs["memory"] = outputs["memory"].detach().requires_grad_()
        return outputs

    with mock.patch.object(TransformerStage, "forward", forward):
        return run_layout(rank, world_size, *args)


def biases_of_each_stage_apart(rank: int, world_size: int, *args: Any) -> Any:
    """Copies of the table of biases are not added up."""
    original = GradSync._holders

    def holders(self: GradSync, pending: Any) -> Any:
        names = [parameter.name for parameter in pending.bucket.offsets]
        return None if any("relative" in name for name in names) else original(self, pending)

    with mock.patch.object(GradSync, "_holders", holders):
        return run_layout(rank, world_size, *args)


def another_source(rank: int, world_size: int, *args: Any) -> Any:
    """Decoder layers of later stages see the padding of a source."""
    original = CrossAttention.forward

    def forward(self: CrossAttention, x: Any, tokens: Any, memory: Any) -> Any:
        if self.q.context.stage and memory is not None:
            starts = memory.tokens.starts.clone()
            starts[1] = starts[2]
            object.__setattr__(memory.tokens, "starts", starts)
        return original(self, x, tokens, memory)

    with mock.patch.object(CrossAttention, "forward", forward):
        return run_layout(rank, world_size, *args)


@pytest.mark.parametrize("wrong", [gradient_of_later_stages_lost, biases_of_each_stage_apart, another_source])
def test_they_are_seen(
    wrong: Callable[..., Any], pool: WorkerPool, pairs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapar.verify.run_layout", wrong)
    values = pairs | FAMILIES["t5"] | {"pipeline.partition": [2, 2, 2]}
    [verdict] = compare(pool, tmp_path, verify_config(pairs["data.prefix"], ["pp3"], **values))
    assert not verdict.passed and ("gradient" in verdict.worst or "loss" in verdict.worst), verdict
