"""Every optimizer in layouts: losses, gradients and three updates are one process's, in fp64 with verify's bounds."""

from pathlib import Path
from typing import Any

import pytest

from megapar.config.schema import PartOptions
from megapar.launch.pool import WorkerPool
from tests.parallel.layouts import STYLES, compare, verify_config

ZERO: dict[str, Any] = {"parallel.zero": 1}
# The rate of the embedding is another one than that of the head, to which it is tied.
GROUPS: dict[str, Any] = {
    "model.tied": True,
    "optim.groups": {
        "embedding": PartOptions(lr_scale=0.5, weight_decay=0.0),
        "layers.[02]": PartOptions(lr_scale=2.0),
        "head": PartOptions(lr_scale=0.0, weight_decay=1.0),
    },
}
ODD: dict[str, Any] = {"model.hidden": 60, "model.head_dim": 2}  # shares of ZeRO-1 end in the middle of a row

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "muon tp2pp2dp2 zero": ("tp2pp2dp2", {"optim.name": "muon", "model.kv_heads": 1} | ZERO),
    "muon tp3dp2 zero odd": ("tp3dp2", {"optim.name": "muon"} | ZERO | ODD),
    "muon tp2dp2 copies": ("tp2dp2", {"optim.name": "muon", "model.kv_heads": 1, "parallel.sequence_parallel": True}),
    "muon gpt2 pp2 zbv": ("pp2", {"optim.name": "muon", "pipeline.schedule": "zbv"} | STYLES["gpt2"]),
    "muon fp32": ("tp2dp2", {"optim.name": "muon", "train.dtype": "fp32"} | ZERO),
    "muon groups": ("tp2pp2dp2", {"optim.name": "muon"} | ZERO | GROUPS),
    "lion tp2pp2dp2 zero": ("tp2pp2dp2", {"optim.name": "lion"} | ZERO),
    "lion gpt2 tp2dp2": ("tp2dp2", {"optim.name": "lion"} | STYLES["gpt2"]),  # the gradient of a key's bias is rounding
    "lion tp3dp2": ("tp3dp2", {"optim.name": "lion"} | ODD),
    "lion groups": ("pp2dp2", {"optim.name": "lion"} | GROUPS),
    "adamw groups": ("tp2pp2dp2", ZERO | GROUPS),
}
MORE = ("muon gpt2 pp2 zbv", "muon fp32", "muon tp2dp2 copies", "lion tp3dp2", "lion groups")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.more] if name in MORE else []) for name in CASES]
)
def test_three_steps(name: str, pool: WorkerPool, tokens: str, tmp_path: Path) -> None:
    layout, values = CASES[name]
    [verdict] = compare(pool, tmp_path, verify_config(tokens, [layout], **{"train.steps": 3} | values))
    assert verdict.passed, verdict
