"""The model trains through the interpreted kernels, in ranks that the launcher starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from megapar.cli import main
from tests.tiny import VOCABULARY, write_tokens
from tests.train.test_run import rows_of

# SMALL's model is Llama-style: RMSNorm, rotary positions, SwiGLU, grouped heads
STYLES = {
    "llama": ["model.kv_heads=2"],
    "gpt2": [
        "model.norm=layernorm",
        "model.position=learned",
        "model.activation=gelu",
        "model.bias=true",
        "model.dropout=0.1",
    ],
    "gemma": [
        "model.norm_order=sandwich",
        "model.norm_offset=true",
        "model.activation=geglu",
        "model.qk_norm=head",
        "model.window=3",
        "model.window_pattern=WF",
        "model.window_rope_theta=100",
        "model.attention_softcap=5",
        "model.logit_softcap=3",
        "model.attention_scale=0.4",
        "model.embedding_scale=4",
        "data.document_mask=true",
    ],
}
SMALL = [
    "model.layers=2",
    "model.hidden=16",
    "model.heads=4",
    f"model.vocab_size={VOCABULARY}",
    "train.seq_length=8",
    "train.micro_batch_size=4",
    "train.global_batch_size=4",
    "train.steps=3",
    "train.dtype=fp32",
    "train.eval_every=0",
    "data.split=0",
    "optim.lr=1e-2",
    "parallel=tp2",
    "logger.wandb.mode=disabled",
]


@pytest.fixture(
    scope="module", params=["llama", *(pytest.param(one, marks=pytest.mark.more) for one in ("gpt2", "gemma"))]
)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    prefix = write_tokens(base)
    for backend in ("torch", "interpret"):
        arguments = [
            *SMALL,
            *STYLES[request.param],
            f"kernels.backend={backend}",
            f"data.path={prefix}",
            f"run.dir={base / backend}",
        ]
        assert main(["train", *arguments]) == 0
    return {backend: base / backend for backend in ("torch", "interpret")}


def test_two_ranks_train_as_in_torch(runs: dict[str, Path]) -> None:
    """fp32 rounds in another order: 1e-7 of a sum, grown over three steps at a high learning rate."""
    interpreted, plain = (rows_of(runs[backend])[0] for backend in ("interpret", "torch"))
    assert len(interpreted) == 3
    for row, expected in zip(interpreted, plain, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5)


def test_a_run_says_which_backend_ran(runs: dict[str, Path]) -> None:
    for backend, folder in runs.items():
        facts: list[dict[str, Any]] = [
            json.loads((folder / n).read_text()) for n in ("environment.json", "summary.json")
        ]
        for kernels in (one["kernels"] for one in facts):
            assert set(kernels.values()) == {backend}
