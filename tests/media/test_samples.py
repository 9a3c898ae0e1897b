"""Stages that read different media of the same samples are not taken for ranks that have read others."""

from pathlib import Path
from typing import Any

import pytest

from megapar.launch.pool import WorkerPool
from tests.media.samples import WRITES
from tests.train.test_samples import config_of, hashes, run_changed

APART = {"pipeline.partition": {"image": [2], "audio": [1], "trunk": [2]}}


@pytest.mark.parametrize("name", [None, "ids"])
def test_encoders_apart(name: str | None, media: dict[str, Any], pool: WorkerPool, tmp_path: Path) -> None:
    config = config_of("", tmp_path, "pp3", **media | WRITES | APART)
    said = set(pool.run(run_changed, 3, config, name or "", -1 if name is None else 2))
    if name is None:
        assert said == {None} and len(set(hashes(tmp_path / "pp3"))) == 3
    else:
        assert all(line is not None and "read others: ids on rank 2 differs from that on" in line for line in said)
