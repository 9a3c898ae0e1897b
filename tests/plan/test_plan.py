"""What a plan says of a rank is what the rank holds and does."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from megapar.config.schema import PartOptions, TrainConfig
from megapar.plan.rank import plan_rank, shortened, state
from megapar.train.trainer import Trainer
from tests.plan.layouts import LAYOUTS, config_of
from tests.plan.recorder import Recording, recording
from tests.plan.replay import alone
from tests.tiny import GPT2, tiny_config


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "evaluation" not in name])
def test_a_plan_is_what_a_rank_holds_and_sends(name: str, tokens: str) -> None:
    """Of the first, a middle and the last rank: elements, bytes of every kind, and every operation by axis."""
    compare_with_steps(config_of(name, tokens))


def compare_with_steps(config: TrainConfig) -> None:
    """Of the first, a middle and the last rank what is planned with what it holds and sends in a step."""
    world = config.parallel.layout.world
    for rank in sorted({0, world // 2, world - 1}):
        planned = plan_rank(config, rank)
        with alone(rank, world), recording() as found:
            trainer = Trainer(config, rank)
            buffers = trainer.buffers
            found.take()
            trainer.step(1)
            called = list(operations(trainer, found))
            parts = [buffers, *([trainer.frozen] if trainer.frozen else [])]
            held = sum(held.view(part.params).numel() for part in parts for held in part.held())
            measured = bytes_of(trainer)
            assert measured == state(trainer)
            row = [str(action) for action in trainer.schedule.rows[trainer.mesh["pp"].index]]
            trainer.close()
        assert planned.parameters == held
        assert {kind: planned.bytes[kind] for kind in measured} == measured
        assert planned.row == row
        # Axes of the same ranks share a group, so that its operations are of one or the other: they are added up.
        for axes in joined([axes for axes, _ in called]):
            mine = [size for of, size in called if of <= axes]
            told = [planned.messages[axis] for axis in axes if axis in planned.messages]
            sums = sum(one.count for one in told), sum(one.bytes for one in told)
            assert sums == (len(mine), sum(mine)), (rank, axes)
        assert planned.messages.keys() <= {axis for axes, _ in called for axis in axes}


def operations(trainer: Trainer, found: Recording) -> Iterator[tuple[frozenset[str], int]]:
    """(axes that have the group, bytes) of all that this rank gave or sent."""
    names: dict[int, set[str]] = {id(dist.group.WORLD): {"world"}}
    for axis in trainer.mesh._axes.values():
        if axis.group is not None:
            names.setdefault(id(axis.group), set()).add(axis.name)
    for one in found.take():
        words = one.text("").split()
        if words[0] not in ("irecv", "wait"):
            yield frozenset(names[id(one.group)]), int(words[-2])


@pytest.mark.parametrize("optimizer", ["lion", "muon"])
def test_a_plan_counts_the_state_that_there_is(optimizer: str, tokens: str) -> None:
    groups = {"layers.1": PartOptions(lr_scale=0.5)}
    config = tiny_config(tokens, **({"optim.name": optimizer, "train.dtype": "bf16", "optim.groups": groups} | GPT2))
    trainer = Trainer(config, 0)
    assert plan_rank(config, 0).bytes.items() >= bytes_of(trainer).items()
    trainer.close()


def joined(sets: list[frozenset[str]]) -> list[set[str]]:
    """Sets that have a member in common, as one."""
    found: list[set[str]] = []
    for one in sets:
        touching = [other for other in found if other & one]
        found = [other for other in found if not other & one] + [set(one).union(*touching)]
    return found


def bytes_of(trainer: Trainer) -> dict[str, int]:
    """What its tensors take, each storage once."""
    kinds = {
        "weights": [*trainer.buffers.params, *(trainer.frozen.params if trainer.frozen else [])],
        "gradients": [*trainer.buffers.grads, *trainer.sync.owned],
        "optimizer": [tensor for tensors in trainer.optimizer.tensors().values() for tensor in tensors],
    }
    counted: set[int] = set()
    found = {}
    for kind, tensors in kinds.items():
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        found[kind] = sum(size for place, size in storages.items() if place not in counted)
        counted |= storages.keys()
    return found


def test_a_long_row_is_shortened() -> None:
    row = [f"0F{number}" for number in range(1000)]
    text = shortened(row, 60)
    assert len(text) <= 60 and text.startswith("0F0 0F1 ") and text.endswith(" 0F999") and " more ... " in text
    assert shortened(row[:3]) == "0F0 0F1 0F2"


HUGE = """
import json, resource, sys
import torch
from megapar.config import TrainConfig, check, resolve
from megapar.config.keys import changed
from megapar.plan.rank import plan_rank
values = {
    "model.layers": 128, "model.hidden": 25600, "model.heads": 160, "model.kv_heads": 8, "model.ffn": 81920,
    "model.vocab_size": 128256, "parallel.tp": 8, "parallel.pp": 64, "parallel.dp": 32, "train.seq_length": 4096,
    "train.micro_batch_size": 1, "train.global_batch_size": 4096, "train.dtype": "bf16", "parallel.zero": 1,
    "parallel.sequence_parallel": True, "parallel.bucket_size": 40_000_000,
}
config = resolve(changed(TrainConfig(), values))
before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
plan = plan_rank(config, int(sys.argv[1]))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"plan": plan.as_json(), "seconds": usage.ru_utime - before, "kib": usage.ru_maxrss}))
"""


def test_a_rank_of_sixteen_thousand() -> None:
    """A model of 10^12 parameters over 16,384 ranks: in seconds and without its memory."""
    done = subprocess.run(
        [sys.executable, "-c", HUGE, "16383"], capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout)
    plan = found["plan"]
    assert plan["coordinates"] == {"pp": 63, "dp": 31, "tp": 7}
    assert plan["parts"] == {"63": ["layers.126", "layers.127", "head"]}
    assert 1.9e9 < plan["parameters"] < 2.6e9
    assert plan["bytes"]["weights"] >= 2 * plan["parameters"]
    assert plan["bytes"]["optimizer"] == pytest.approx(plan["parameters"] * 12 / 32, rel=0.01)
    assert plan["messages"]["pp"]["count"] == 128  # a gradient for each micro-batch
    assert found["kib"] < 2 * 2**20
    assert found["seconds"] < 60  # of a core; 3 where this was written
