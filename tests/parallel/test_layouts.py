"""Every layout against the one-process run, in fp64 with verify's bounds; and what verify must not overlook."""

from pathlib import Path
from typing import Any

import pytest

from megapar.config.layout import Layout
from megapar.launch.pool import WorkerPool
from megapar.schedule.build import generators
from tests.pairwise import pairwise, parameters
from tests.parallel import mutants
from tests.parallel.layouts import ALL, ALL_OF_EIGHT, EIGHT, STYLES, compare, verify_config

FIRST = ("tp2", "pp2", "dp2", "tp2pp2", "tp2dp2", "pp2dp2", "tp2pp2dp2", "tp3", "pp4")


@pytest.mark.parametrize("layout", [pytest.param(one, marks=[] if one in FIRST else [pytest.mark.more]) for one in ALL])
def test_every_layout(layout: str, pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    [verdict] = compare(pool, tmp_path, verify_config(prefix, [layout]))
    assert verdict.passed, verdict


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("everything", [False, True])
def test_every_layout_of_eight(style: str, everything: bool, pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    """Also the long pipelines and the wide splits; with everything on, and with everything off."""
    values = EIGHT | STYLES[style] | {"train.seq_length": 24}
    if everything:
        values |= {"parallel.sequence_parallel": True, "parallel.zero": 1, "model.dropout": 0.1, "model.kv_heads": 1}
        values |= {"train.recompute": "full"}
    verdicts = compare(pool, tmp_path, verify_config(prefix, ALL_OF_EIGHT, **values))
    assert [verdict for verdict in verdicts if not verdict.passed] == []
    assert len(verdicts) == len(ALL_OF_EIGHT)


OPTIONS: dict[str, list[Any]] = {
    "layout": ["tp2", "pp2", "dp2", "tp2pp2", "tp3", "tp2dp2", "pp4", "pp2dp3", "tp2pp2dp2"],
    "style": ["llama", "gpt2"],
    "model.tied": [False, True],
    "model.kv_heads": [1, 4, 12],
    "model.dropout": [0.0, 0.1],
    "parallel.sequence_parallel": [False, True],
    "parallel.tp_overlap": ["serial", "chunked"],
    "parallel.zero": [0, 1],
    "train.recompute": ["none", "selective", "full"],
    "pipeline.schedule": ["1f1b", "gpipe"],
    "parallel.bucket_size": [500, 3000],
    "uneven": [False, True],
    "train.dtype": ["fp64", "fp32"],
}


def divides(case: dict[str, Any]) -> bool:
    tp = Layout.parse(case["layout"])["tp"]
    return case["model.kv_heads"] % tp == 0 or tp % case["model.kv_heads"] == 0


CASES = pairwise(OPTIONS, divides)


@pytest.mark.parametrize("case", parameters(CASES, "layout", "style", "pipeline.schedule", "train.recompute"))
def test_options(case: dict[str, Any], pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    values = STYLES[case["style"]] | {key: value for key, value in case.items() if "." in key}
    stages = Layout.parse(case["layout"])["pp"]
    if case["uneven"] and stages > 1:
        values["model.layers"] = 5
        values["pipeline.partition"] = {2: [4, 1], 4: [1, 1, 2, 1]}[stages]
    [verdict] = compare(pool, tmp_path, verify_config(prefix, [case["layout"]], **values))
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("layout", "partition", "values"),
    [
        ("pp2", [4, 0], {}),
        ("pp3", [0, 4, 0], {"model.tied": True}),
        ("tp2pp3", [2, 2, 0], {"parallel.sequence_parallel": True, "parallel.zero": 1}),
        ("pp2", [2, 1, 1, 0], {"pipeline.schedule": "zbv", "model.tied": True}),
    ],
)
def test_stages_without_layers(
    layout: str, partition: list[int], values: dict[str, Any], pool: WorkerPool, prefix: str, tmp_path: Path
) -> None:
    """The embedding, or the head, may be alone on its stage."""
    values = {"pipeline.partition": partition, "train.steps": 1} | values
    [verdict] = compare(pool, tmp_path, verify_config(prefix, [layout], **values))
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    ("layout", "sequence_parallel"),
    [("tp2", True), *(pytest.param(*case, marks=pytest.mark.more) for case in (("tp4", False), ("tp2pp2", True)))],
)
def test_fused_matmuls(
    layout: str, sequence_parallel: bool, interpreter: WorkerPool, prefix: str, tmp_path: Path
) -> None:
    """Triton kernels alone, in the interpreter; the one-process run too."""
    values = {"kernels.backend": "interpret", "train.dtype": "fp32", "train.steps": 1, "model.layers": 2}
    values |= {"train.micro_batch_size": 2, "train.global_batch_size": 4, "model.heads": 4, "model.ffn": 24}
    values |= {"parallel.tp_overlap": "symmetric", "parallel.sequence_parallel": sequence_parallel}
    [verdict] = compare(interpreter, tmp_path, verify_config(prefix, [layout], **values))
    assert verdict.passed, verdict


SCHEDULE_CASES = pairwise(
    {
        "pipeline.schedule": sorted(generators()),
        "layout": ["pp2", "pp3", "pp4", "tp2pp2dp2", "tp2pp4"],
        "style": ["llama", "gpt2"],
        "model.tied": [False, True],
        "parallel.zero": [0, 1],
        "parallel.bucket_size": [500, 3000],
    }
)


@pytest.mark.parametrize("case", parameters(SCHEDULE_CASES, "pipeline.schedule", "layout"))
def test_every_schedule(case: dict[str, Any], pool: WorkerPool, prefix: str, tmp_path: Path) -> None:
    values = STYLES[case["style"]] | {key: value for key, value in case.items() if "." in key}
    values |= {"model.layers": 8, "train.steps": 1}
    config = verify_config(prefix, [case["layout"]], **values)
    [verdict] = compare(pool, tmp_path, config)
    assert verdict.passed, verdict


@pytest.mark.parametrize("layout", ["tp2", "tp3", "tp3dp2"])
@pytest.mark.parametrize("bucket_size", [180, *(pytest.param(n, marks=pytest.mark.more) for n in (290, 510, 730, 760))])
def test_uneven_shards_cut_the_same_buckets(
    layout: str, bucket_size: int, pool: WorkerPool, prefix: str, tmp_path: Path
) -> None:
    """The vocabulary's shards differ by a row: a bucket that holds one and a norm must be cut alike on all ranks."""
    values = {"parallel.bucket_size": bucket_size, "parallel.sequence_parallel": True, "train.timeout_s": 60.0}
    [verdict] = compare(pool, tmp_path, verify_config(prefix, [layout], **values, **{"train.steps": 1}))
    assert verdict.passed, verdict


# One of each kind of mistake: a sum left out, one too many, a norm, a copy, a number that depends on the layout, a part
# taken for the whole.
KINDS_OF_MUTANTS = {
    "no_reduction_of_outputs",
    "bucket_reduced_twice",
    "replicated_head_counted_twice",
    "stale_copy_of_the_parameters",
    "dropout_by_local_position",
    "parts_of_matrices_made_orthogonal",
}
MUTANTS = [
    pytest.param(one, id=one.__name__, marks=[] if one.__name__ in KINDS_OF_MUTANTS else [pytest.mark.more])
    for one in mutants.MUTANTS
]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_seen(mutant: Any, pool: WorkerPool, prefix: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Break the code in one place, in every worker: verify must say so."""
    monkeypatch.setattr("megapar.verify.run_layout", mutant.run_layout)
    values = {"model.tied": True, "model.kv_heads": 1, "parallel.sequence_parallel": mutant.sequence_parallel}
    config = verify_config(prefix, ["tp2pp2dp2"], **values, **mutant.values)
    [verdict] = compare(pool, tmp_path, config)
    assert not verdict.passed
    assert mutant.shows in verdict.worst, verdict
