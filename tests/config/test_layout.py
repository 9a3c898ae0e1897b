"""Layouts by name, the order of ranks, and that an axis is declared in one place."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from megapar.config.errors import ConfigError
from megapar.config.layout import AXES, RANK_ORDER, Layout, layouts_of, layouts_up_to
from megapar.mesh import Mesh

ROOT = Path(__file__).parents[2]


def test_names() -> None:
    assert str(Layout()) == "single"
    assert str(Layout(dp=4, tp=2)) == "tp2dp4"
    assert Layout.parse("dp4tp2") == Layout(tp=2, dp=4)
    assert [str(layout) for layout in layouts_up_to(3)] == ["dp2", "pp2", "tp2", "dp3", "pp3", "tp3"]
    assert len(layouts_up_to(64)) == sum(1 for sizes in product(range(1, 65), repeat=3) if 1 < prod(sizes) <= 64)


def test_layouts_of_many_ranks_are_found_by_their_factors() -> None:
    """All triples of sizes up to the number were tried: of 1,024 ranks a thousand millions."""
    found = layouts_of(1024)
    assert len(found) == len({layout.sizes for layout in found}) == 66 and {layout.world for layout in found} == {1024}
    assert [str(layout) for layout in layouts_of(10**9 + 7)] == [f"{axis}1000000007" for axis in ("dp", "pp", "tp")]
    for name in ("", "tp", "tp0", "tp2tp2", "xp2", "tp2 pp2", "single2"):
        with pytest.raises(ConfigError):
            Layout.parse(name)


def test_ranks_have_coordinates() -> None:
    assert sorted(RANK_ORDER) == sorted(AXES)
    layout = Layout(tp=2, pp=3, dp=4)
    assert layout.coordinates(0) == {"pp": 0, "dp": 0, "tp": 0}
    assert layout.coordinates(1)["tp"] == 1  # tensor-parallel peers are neighbours
    assert [layout.rank_at(layout.coordinates(rank)) for rank in range(layout.world)] == list(range(24))
    assert {Mesh(layout, rank, groups=False).first_rank(pp=2) for rank in range(24)} == {16}
    assert layout.replicas == 4
    assert layout.replica(layout.coordinates(23)) == 3


DECLARED = '        AxisKind("xp", "ranks that repeat each other", None),\n    )\n}'


@pytest.fixture(scope="module")
def with_new_axis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the product with one more axis declared, in one file."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("megapar", "kernels", "conf"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    path = copy / "megapar" / "config" / "layout.py"
    text = path.read_text()
    changed = text.replace("    )\n}", DECLARED, 1).replace(
        'RANK_ORDER = ("pp", "dp", ', 'RANK_ORDER = ("pp", "xp", "dp", '
    )
    assert changed.count("xp") == 2
    path.write_text(changed)
    return copy


def megapar(copy: Path, *arguments: str) -> str:
    env = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megapar.cli", *arguments]
    done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


TINY_WORDS = "model.hidden=16 model.heads=4 model.layers=2 model.ffn=32 model.vocab_size=61 train.seq_length=8"
TINY = TINY_WORDS.split()
SHORT_WORDS = "model.dropout=0.1 train.micro_batch_size=2 train.global_batch_size=8 train.dtype=fp32 train.steps=3"
SHORT = SHORT_WORDS.split()


@pytest.mark.more
def test_a_new_axis_of_one_rank_is_everywhere(with_new_axis: Path, tokens: str) -> None:
    keys = megapar(with_new_axis, "train", "--info", "keys")
    assert "parallel.xp" in keys
    assert "ranks that repeat each other" in keys
    arguments = ("layouts=[tp2pp2,dp2]", f"data.path={tokens}", *TINY, "run.dir=checked")
    assert "2 of 2 layouts agree" in megapar(with_new_axis, "verify", *arguments)


@pytest.mark.more
def test_ranks_that_repeat_each_other_change_no_bit(with_new_axis: Path, tokens: str) -> None:
    """An axis of size 2 that splits nothing: losses, norms and checkpoints of the run without it, and verify agrees."""
    found = {}
    for layout, zero, ranks in (("dp2", 1, 2), ("xp2dp2", 1, 4), ("single", 0, 1), ("xp2", 0, 2)):
        arguments = (f"parallel={layout}", f"parallel.zero={zero}", f"data.path={tokens}", f"run.dir={layout}")
        steps = ("logger=disabled", "train.eval_every=3", "train.eval_samples=4")
        said = megapar(with_new_axis, "train", *arguments, *TINY, *SHORT, *steps)
        assert f"xp={2 if 'xp' in layout else 1}" in said
        found[layout] = (figures(with_new_axis / layout), checkpoint(with_new_axis / layout))
        trace = json.loads((with_new_axis / layout / "trace.json").read_text())
        assert len({event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"}) == ranks
    assert found["xp2dp2"] == found["dp2"]
    assert found["xp2"] == found["single"]
    compared = ("layouts=[tp2xp2pp2]", f"data.path={tokens}", *TINY, "run.dir=compared")
    assert "1 of 1 layouts agree" in megapar(with_new_axis, "verify", *compared)


def figures(run: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row.get("loss"), row.get("grad_norm"), row.get("val_loss")) for row in rows]


def checkpoint(run: Path) -> dict[str, bytes]:
    """Every tensor of the last checkpoint by its key: each is in one file alone."""
    [folder] = (run / "checkpoints").glob("step-*")
    tensors = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    assert sum(map(len, tensors)) == len({key for one in tensors for key in one})
    return {key: value.tobytes() for one in tensors for key, value in one.items()}
