"""What every rank of a layout holds and sends is what is written down in `golden/`.

A change that is meant to change it: `make replay`, and look at the difference before it is committed.
"""

import difflib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from megapar.schedule.build import generators
from tests.plan.layouts import LAYOUTS, config_of
from tests.plan.mutants import MUTANTS
from tests.plan.replay import GOLDEN, plan
from tests.plan.text import fold
from tests.tiny import write_tokens

Replayed = Callable[..., str]


@pytest.fixture(scope="module")
def replayed() -> Iterator[Replayed]:
    """(name of a layout, mutant, **values) -> its plan, made in a process whose default group nobody else needs."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as process:
        yield lambda *args, **values: process.submit(_replay, *args, **values).result()


def _replay(name: str, mutant: str | None = None, **values: object) -> str:
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(name, write_tokens(Path(folder)), **values)
        return plan(config, MUTANTS[mutant]) if mutant else plan(config)


def golden(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")


def difference(expected: str, found: str) -> str:
    """Unified, each part under the title of its section."""
    before = expected.splitlines()
    lines = list(difflib.unified_diff(before, found.splitlines(), "written down", "replayed", lineterm=""))
    for at, line in enumerate(lines):
        if line.startswith("@@"):
            first = int(line.split()[1].split(",")[0].lstrip("-"))
            titles = [text for text in before[: first + 2] if text and not text.startswith(" ")]
            lines[at] = f"{line} {titles[-1] if titles else ''}"
    return "\n".join(lines)


@pytest.mark.parametrize("name", LAYOUTS)
def test_plan(replayed: Replayed, name: str) -> None:
    changed = difference(golden(name), replayed(name))
    if changed:
        pytest.fail(f"the plan of {name} has changed; if it should: make replay\n{changed}", pytrace=False)


def test_the_same_when_replayed_again(replayed: Replayed) -> None:
    for name in ("tp2pp2dp2_gpt2_zero_sp_dropout_bf16", "pp3_v_min"):
        assert replayed(name) == replayed(name)


def test_nothing_else_is_written_down() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {f"{name}.txt" for name in LAYOUTS}


def test_every_schedule_is_replayed() -> None:
    """Those of the layouts' values; 1f1b is the default."""
    used = {values.get("pipeline.schedule", "1f1b") for _, values in LAYOUTS.values()}
    assert used >= generators().keys()


@pytest.mark.parametrize(("mutant", "lost"), [("all_reduce_dropped", "all_reduce tp"), ("transfers_swapped", "isend")])
def test_mutants_are_seen(replayed: Replayed, mutant: str, lost: str) -> None:
    """And the difference shows where."""
    changed = difference(golden("tp2pp2dp2"), replayed("tp2pp2dp2", mutant))
    assert any(line.startswith("-") and lost in line for line in changed.splitlines())


def test_a_bucket_cut_elsewhere_is_seen(replayed: Replayed) -> None:
    changed = difference(golden("tp2dp2_one_bucket"), replayed("tp2dp2_one_bucket", **{"parallel.bucket_size": 3000}))
    lost = [line for line in changed.splitlines() if line.startswith("-")]
    assert any(", owned " in line for line in lost) and any("start all_reduce dp" in line for line in lost)


def test_fold() -> None:
    assert fold(list("abc")) == ["a", "b", "c"]
    assert fold(list("aabab")) == ["2 x a", "b", "a", "b"]
    assert fold(["a", *"bcd" * 3, "e"]) == ["a", "3 x {", "  b", "  c", "  d", "}", "e"]
    assert fold([*"bbbc" * 3]) == ["3 x {", "  3 x b", "  c", "}"]
