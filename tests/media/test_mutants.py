"""Encoders of media that are wrong in one place are seen by the comparison with one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megapar import verify
from megapar.launch.pool import WorkerPool
from megapar.models import media as media_models
from megapar.models.stage import MediumStack
from megapar.models.tokens import Tokens
from megapar.parallel.collectives import gather_tokens
from megapar.tasks.media import MediaTask
from tests.media.samples import CLASSIFIES
from tests.parallel.layouts import compare, verify_config

run_layout = verify.run_layout
PIPELINE = {"pipeline.partition": {"image": [2], "audio": [1], "trunk": [2]}}


def gradient_of_an_encoder_lost(rank: int, world_size: int, *args: Any) -> Any:
    """The tokens of images are handed on without a way back."""
    original = MediumStack.read

    def read(self: MediumStack, streams: Any, batch: Any) -> None:
        original(self, streams, batch)
        if "image_tokens" in streams:
            streams["image_tokens"] = streams["image_tokens"].detach().requires_grad_()

    with mock.patch.object(MediumStack, "read", read):
        return run_layout(rank, world_size, *args)


def places_of_one_rank(rank: int, world_size: int, *args: Any) -> Any:
    """Tokens that stand in another rank's share of the text have no gradient."""
    with mock.patch.object(media_models, "gather_into_region", gather_tokens):
        return run_layout(rank, world_size, *args)


def images_that_see_each_other(rank: int, world_size: int, *args: Any) -> Any:
    """A micro-batch's patches are one sequence."""
    original = Tokens.of_medium.__func__  # type: ignore[attr-defined]

    def of_medium(cls: type[Tokens], batch: Any, context: Any, name: str) -> Tokens:
        tokens: Tokens = original(cls, batch, context, name)
        starts = tokens.starts
        assert starts is not None
        object.__setattr__(tokens, "starts", starts[[0, -1]])
        return tokens

    with mock.patch.object(Tokens, "of_medium", classmethod(of_medium)):
        return run_layout(rank, world_size, *args)


def dropped_by_the_place(rank: int, world_size: int, *args: Any) -> Any:
    """Which modality is left out depends on where a sample is in its micro-batch."""
    original = MediaTask.kept

    def kept(self: MediaTask, split: Any, number: int, sample: Any) -> Any:
        return original(self, split, number + self.mesh.samples.index, sample)  # rank 0's are right

    with mock.patch.object(MediaTask, "kept", kept):
        return run_layout(rank, world_size, *args)


SPLIT = {"parallel.sequence_parallel": True, "train.micro_batch_size": 2}
MUTANTS: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (gradient_of_an_encoder_lost, "pp3", PIPELINE),
    (places_of_one_rank, "tp2", SPLIT),
    (images_that_see_each_other, "tp2", {}),
    (dropped_by_the_place, "dp2", {"task.modality_dropout": 0.5}),
]


@pytest.mark.parametrize(("mutant", "layout", "more"), MUTANTS, ids=[mutant.__name__ for mutant, _, _ in MUTANTS])
def test_is_seen(
    mutant: Callable[..., Any],
    layout: str,
    more: dict[str, Any],
    pool: WorkerPool,
    media: dict[str, Any],
    tmp_path: Path,
) -> None:
    config = verify_config(media["data.prefix"], [layout], **media, **CLASSIFIES, **more)
    with mock.patch.object(verify, "run_layout", mutant):
        [verdict] = compare(pool, tmp_path, config)
    assert not verdict.passed and ("gradient" in verdict.worst or "loss" in verdict.worst), verdict
