"""Models of images, sound and text in layouts: losses, gradients and weights of the one-process run.

Micro-batches of one sample often lack a medium, and then leave its encoder unused.
"""

from pathlib import Path
from typing import Any

import pytest

from megapar.config.layout import Layout
from megapar.launch.pool import WorkerPool
from megapar.operations import check_operations
from tests.media.samples import CLASSIFIES, WRITES
from tests.pairwise import pairwise, parameters
from tests.parallel.layouts import compare, verify_config

TASKS = {"classifies": CLASSIFIES, "writes": WRITES}
ENCODERS_APART = {"image": [2], "audio": [1], "trunk": [2]}
OPTIONS: dict[str, list[Any]] = {
    "task": list(TASKS),
    "layout": ["tp2", "dp2", "pp2", "tp2pp2", "pp3", "pp4", "tp3", "tp2pp2dp2"],
    "pipeline.partition": ["uniform", "balanced", [3, 1, 1], [1, 3, 1], [3, 2], [2, 1, 1, 1], ENCODERS_APART],
    "parallel.sequence_parallel": [False, True],
    "parallel.zero": [0, 1],
    "train.micro_batch_size": [1, 3],
    "train.recompute": ["none", "selective", "full"],
    "pipeline.schedule": ["1f1b", "zb_h1", "gpipe"],
    "task.modality_dropout": [0.0, 0.4],
    "model.dropout": [0.0, 0.1],
    "model.norm": ["rmsnorm", "layernorm"],
}


def fits(case: dict[str, Any]) -> bool:
    layout, partition = Layout.parse(case["layout"]), case["pipeline.partition"]
    if layout["pp"] == 1 and case["pipeline.schedule"] != "1f1b":
        return False
    if layout["dp"] * case["train.micro_batch_size"] == 6 and layout["pp"] > 1:
        return False  # too few micro-batches for zb_h1
    return isinstance(partition, str) or len(partition) == layout["pp"]


@pytest.mark.parametrize("case", parameters(pairwise(OPTIONS, fits), "task", "layout"))
def test_in_a_layout(case: dict[str, Any], pool: WorkerPool, media: dict[str, Any], tmp_path: Path) -> None:
    values = media | TASKS[case["task"]] | {key: value for key, value in case.items() if "." in key}
    [verdict] = compare(pool, tmp_path, verify_config(media["data.prefix"], [case["layout"]], **values))
    assert verdict.passed, verdict


@pytest.mark.parametrize("task", TASKS)
def test_their_operations(task: str, media: dict[str, Any]) -> None:
    values = media | TASKS[task] | {"model.layers": 1, "model.image.layers": 1, "model.heads": 4, "model.hidden": 16}
    found = check_operations(verify_config(media["data.prefix"], ["tp2"], **values))
    assert found.wrong == [] and found.not_alone == [] and found.error < 5e-7
