"""The learning rate of every schedule: where it begins and ends, and its shape between."""

import math
from typing import Any

import pytest

from megapar.config.schema import OptimConfig
from megapar.optim.schedule import learning_rate

STEPS = 40


def rates(**values: Any) -> list[float]:
    config = OptimConfig(lr=2.0, min_lr=0.1, **values)
    return [learning_rate(config, step, STEPS) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 4, STEPS])
def test_ends_and_shape(schedule: str, warmup: int) -> None:
    found = rates(schedule=schedule, warmup_steps=warmup)
    assert found[:warmup] == [2.0 * step / warmup for step in range(1, warmup + 1)]
    behind = found[warmup:]
    assert all(rate > 0 for rate in found)
    assert behind == sorted(behind, reverse=True)
    if behind:
        assert behind[-1] == pytest.approx(2.0 if schedule == "constant" else 0.2, rel=1e-15)


def test_shapes() -> None:
    """Behind 10 steps of warm-up: a line halves at the middle, as a cosine does, and a third of the way tells them
    apart. wsd stays for 26 of the 30 steps, and goes down in the last tenth of all."""
    line, cosine = (rates(schedule=schedule, warmup_steps=10) for schedule in ("linear", "cosine"))
    assert line[24] == pytest.approx(1.1) and cosine[24] == pytest.approx(1.1)
    assert line[19] == pytest.approx(0.2 + 1.8 * 2 / 3)
    assert cosine[19] == pytest.approx(0.2 + 0.9 * (1 + math.cos(math.pi / 3)))
    wsd = rates(schedule="wsd", warmup_steps=10)
    assert wsd[10:36] == [2.0] * 26
    assert wsd[36:] == pytest.approx([1.55, 1.1, 0.65, 0.2])
    assert rates(schedule="wsd", warmup_steps=10, decay_steps=2)[37:] == pytest.approx([2.0, 1.1, 0.2])
    assert rates(schedule="constant", warmup_steps=10)[10:] == [2.0] * 30


def test_a_tenth_is_rounded_up_and_leaves_the_warm_up_alone() -> None:
    config = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd")
    assert [learning_rate(config, step, 11) for step in (9, 10, 11)] == [1.0, 0.5, 0.0]
    config = OptimConfig(lr=1.0, min_lr=0.0, schedule="wsd", warmup_steps=10)
    assert [learning_rate(config, step, 11) for step in (10, 11)] == [1.0, 0.0]


def test_cosine_has_the_bits_that_it_had() -> None:
    """Of its formula before there were others."""
    for step in range(5, STEPS + 1):
        done = (step - 4) / max(1, STEPS - 4)
        floor = 2.0 * 0.1
        expected = floor + (2.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        assert rates(warmup_steps=4)[step - 1] == expected
