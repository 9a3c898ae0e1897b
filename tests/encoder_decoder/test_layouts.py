"""Encoder and decoder in layouts: losses, gradients and weights of the one-process run."""

from pathlib import Path
from typing import Any

import pytest

from megapar.config.layout import Layout
from megapar.launch.pool import WorkerPool
from megapar.operations import check_operations
from tests.encoder_decoder.pairs import FAMILIES
from tests.pairwise import pairwise, parameters
from tests.parallel.layouts import compare, verify_config

OPTIONS: dict[str, list[Any]] = {
    "family": list(FAMILIES),
    "layout": ["tp2", "dp2", "tp2pp2", "pp4", "tp2pp2dp2", "pp3", "tp3"],
    "pipeline.partition": ["uniform", "balanced", [1, 3, 2], [1, 1, 2, 2], [3, 3]],
    "model.kv_heads": [1, 4, 12],
    "parallel.sequence_parallel": [False, True],
    "parallel.zero": [0, 1],
    "train.recompute": ["none", "selective", "full"],
    "pipeline.schedule": ["1f1b", "zb_h1", "gpipe"],
}


def fits(case: dict[str, Any]) -> bool:
    layout = Layout.parse(case["layout"])
    tp, partition = layout["tp"], case["pipeline.partition"]
    if layout["pp"] == 1 and case["pipeline.schedule"] != "1f1b":
        return False
    if isinstance(partition, list) and len(partition) != layout["pp"]:
        return False
    return case["model.kv_heads"] % tp == 0 or tp % case["model.kv_heads"] == 0


@pytest.mark.parametrize("case", parameters(pairwise(OPTIONS, fits), "family", "layout"))
def test_in_a_layout(case: dict[str, Any], pool: WorkerPool, pairs: dict[str, Any], tmp_path: Path) -> None:
    values = pairs | FAMILIES[case["family"]] | {key: value for key, value in case.items() if "." in key}
    [verdict] = compare(pool, tmp_path, verify_config(pairs["data.prefix"], [case["layout"]], **values))
    assert verdict.passed, verdict


@pytest.mark.parametrize("family", FAMILIES)
def test_their_operations(family: str, pairs: dict[str, Any]) -> None:
    values = pairs | FAMILIES[family] | {"model.layers": 1, "model.kv_heads": 2, "model.heads": 4, "model.hidden": 16}
    found = check_operations(verify_config(pairs["data.prefix"], ["tp2"], **values | {"model.encoder.layers": 1}))
    assert found.wrong == [] and found.not_alone == [] and found.error < 5e-7
