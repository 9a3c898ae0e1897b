"""The policy gradient: in layouts as in one process, as its formula, and what a faulty reward comes to."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from megapar.checkpoint import load, save
from megapar.config.errors import ConfigError, UserError
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.data.sources.prompts import Prompt
from megapar.interpret.capture import Capture
from megapar.launch.pool import WorkerPool
from megapar.operations import check_operations
from megapar.tasks.completions import Judged, Written
from megapar.tasks.kinds.policy import EPSILON, GAPS
from megapar.tasks.reward import Reward, find_reward
from megapar.train.trainer import Trainer
from megapar.verify import relative
from tests.parallel.layouts import compare, verify_config
from tests.records import prepared
from tests.tasks import rewards
from tests.tiny import tiny_config

GROUP = 4
SAME = {"write_s", "logprob_gap"}  # figures that no two layouts share


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    task = {"name": "policy", "group": GROUP, "max_tokens": 6, "kl": 0.1}
    shape = {
        "reward": "tests.tasks.rewards:mixed",
        "train.seq_length": 24,
        "train.global_batch_size": 16,
        "model.kv_heads": 4,
        "train.dtype": "fp64",
    }
    return prepared(tmp_path_factory.mktemp("policy"), "prompts") | shape | {f"task.{k}": v for k, v in task.items()}


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("tp2", {"parallel.sequence_parallel": True, "task.temperature": 0.7}),
    ("pp2", {"pipeline.schedule": "zb_h1", "train.recompute": "full"}),
    ("dp2", {"parallel.zero": 1, "task.write_batch": 3, "train.micro_batch_size": 2}),
    ("tp2pp2dp2", {"task.kl": 0.0}),
]


@pytest.mark.parametrize(("layout", "values"), LAYOUTS, ids=[layout for layout, _ in LAYOUTS])
def test_in_a_layout(
    layout: str, values: dict[str, Any], keys: dict[str, Any], pool: WorkerPool, tmp_path: Path
) -> None:
    """fp64, to rounding: the loss, every gradient and every updated weight of two steps, with what each writes itself.

    The prompts' groups lie over both replicas, as a micro-batch is smaller than a group.
    """
    small: dict[str, Any] = {"model.layers": 2, "model.hidden": 16, "model.heads": 4, "train.micro_batch_size": 1}
    config = verify_config(keys["data.prefix"], [layout], **small | keys | values)
    [verdict] = compare(pool, tmp_path, config)
    assert verdict.passed, verdict


def test_its_gradients_are_right(keys: dict[str, Any]) -> None:
    """Against finite differences, the divergence from the reference too: weights are not the reference's there."""
    more = {"task.kl": 3.0, "task.temperature": 0.8, "model.vocab_size": 311}  # more rows than tokens
    config = tiny_config("", **keys | more)
    report = check_operations(config, None)
    assert not report.wrong and report.error < 1e-5


def stepped(rank: int, world_size: int, config: TrainConfig) -> dict[str, Any]:
    """Figures of three steps and an evaluation, and how often this rank called the reward."""
    rewards.CALLS.clear()
    trainer = Trainer(config, rank)
    said = [dict(trainer.step(step).said) for step in range(1, 4)]
    calls, measured = list(rewards.CALLS), trainer.evaluate()
    trainer.close()
    return {"said": said, "calls": calls, "measured": measured}


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_what_steps_and_evaluations_say(dtype: str, keys: dict[str, Any], pool: WorkerPool) -> None:
    """The same in every layout, of held-out prompts that divide by no rank's batch; rewards are asked for once per
    completion; and the model that writes has the probabilities of the one that learns, though the tokenizer has fewer
    tokens than the model rows.
    """
    more = {"train.eval_every": 1, "train.eval_samples": 3, "model.vocab_size": 311, "task.temperature": 1.3}
    found = {}
    for name in ("single", "tp2", "pp2", "dp2"):
        layout = Layout.parse(name)
        axes = {f"parallel.{axis}": size for axis, size in layout.items()}
        config = tiny_config("", **keys | more | axes | {"train.dtype": dtype})
        found[name] = ranks = pool.run(stepped, layout.world, config)
        steps = [call for rank in ranks for call in rank["calls"]]
        assert len(steps) == 3 * 16
        assert all(rank["said"][0].keys() == ranks[0]["said"][0].keys() for rank in ranks)
        gaps = [said["logprob_gap"] for rank in ranks for said in rank["said"]]
        # Measured: at most 1e-14 and 2e-6.
        assert 0.0 < max(gaps) < {"fp64": 1e-12, "fp32": 1e-4}[dtype] < GAPS[dtype], name
    [alone] = found["single"]
    assert alone["said"][0]["kl"] == pytest.approx(0.0, abs=1e-12) and alone["said"][2]["kl"] > 1e-6
    for name, ranks in found.items():
        rel, near = (1e-9, 1e-12) if dtype == "fp64" else (1e-4, 1e-6)
        for expected, said in zip(alone["said"], ranks[0]["said"], strict=True):
            assert without(said) == pytest.approx(without(expected), rel=rel, abs=near), name
        sums = [sum(parts) for parts in zip(*(rank["measured"] for rank in ranks), strict=True)]
        assert sums == pytest.approx(alone["measured"], rel=1e-9), name
    assert sorted(alone["calls"]) == sorted(call for rank in found["dp2"] for call in rank["calls"])


def without(said: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in said.items() if name not in SAME}


def one(keys: dict[str, Any], **values: Any) -> tuple[Trainer, Any, Any]:
    trainer = Trainer(tiny_config("", **keys | values), 0)
    [stage] = trainer.stages.values()
    return trainer, stage, trainer.task


def logprobs(stage: Any, row: Tensor, temperature: float) -> Tensor:
    """Of every token of a text but the first, [n - 1], by a plain forward of the text alone."""
    batch = {"ids": row[:-1].view(1, -1), "samples": torch.tensor([0]), "step": torch.tensor(0)}
    logits = stage({}, batch)["logits"] / temperature
    return log_softmax(logits, 1).gather(1, row[1:].view(-1, 1)).squeeze(1)


def test_the_loss_is_its_formula(keys: dict[str, Any]) -> None:
    """Equations 3 and 4 of Shao et al. 2024, of single completions, with probabilities that have moved by more than
    the bound; fp64."""
    trainer, stage, task = one(keys, **{"task.temperature": 0.7, "task.clip": 0.1, "optim.lr": 0.05})
    trainer.step(1)
    [reference] = task.reference.part.stages.values()
    stage.train(False)
    written: list[Written] = []
    write = task.writer.write

    def seen(*args: Any) -> Written:
        written.append(write(*args))
        return written[-1]

    task.writer.write = seen
    batches = task.batches(2)
    draw = torch.Generator().manual_seed(1)
    moved = [torch.randn(batch["sampled"].shape, generator=draw, dtype=torch.float64) / 5 for batch in batches]
    batches = [batch | {"sampled": batch["sampled"] + by} for batch, by in zip(batches, moved, strict=True)]
    with torch.no_grad():
        found = sum(task.loss(stage({}, batch), batch) for batch in batches)
    judged = [written[0].judged[number].reward for number in range(16, 32)]
    losses, outside = [], 0
    for number, text in enumerate(written[0].texts):
        group = np.array(judged[number // GROUP * GROUP :][:GROUP])
        advantage = float((judged[number] - group.mean()) / (group.std() + EPSILON))
        row = torch.from_numpy(task.writer.sequence(text)[0])
        with torch.no_grad():
            now, frozen = (logprobs(model, row, 0.7)[text.prompt - 1 :] for model in (stage, reference))
        size = trainer.config.train.micro_batch_size
        by = moved[number // size][number % size][text.prompt - 1 :][: len(now)]
        ratios = (now - (torch.tensor(text.logprobs, dtype=torch.float64) + by)).exp()
        outside += int(((ratios - 1).abs() > 0.1).sum())
        gains = torch.minimum(ratios * advantage, ratios.clamp(0.9, 1.1) * advantage)
        losses.append((0.1 * ((frozen - now).exp() - (frozen - now) - 1) - gains).mean())
    assert outside > 20
    assert float(found) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-10)
    trainer.close()


def test_advantages(keys: dict[str, Any]) -> None:
    trainer, _, task = one(keys)
    groups = [[1.0, 0.0, 0.0, 1.0], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 4.0]]
    advantages, figures = task._judge([Judged(reward, 2, cut=reward == 4) for group in groups for reward in group])
    assert advantages[:4] == pytest.approx([1, -1, -1, 1], rel=1e-3) and not advantages[4:8].any()
    assert advantages[8:] == pytest.approx([-1 / 3**0.5] * 3 + [3**0.5], rel=1e-3)
    assert figures["flat_groups"] == pytest.approx(1 / 3) and figures["cut_completions"] == pytest.approx(1 / 12)
    assert figures["reward"] == pytest.approx(6.4 / 12) and figures["completion_tokens"] == 2
    trainer.close()


def failed(rank: int, world_size: int, config: TrainConfig, shift: float) -> tuple[str, bool]:
    """What the first step that fails says, and whether no weight has changed by it. shift: of what was drawn, on the
    last rank."""
    trainer = Trainer(config, rank)
    task: Any = trainer.task
    rows = task._rows
    if rank == world_size - 1:
        task._rows = lambda *args: (found := rows(*args)) | {"sampled": found["sampled"] + shift}
    for step in range(1, 30):
        before = [bucket.clone() for bucket in trainer.buffers.params]
        try:
            trainer.step(step)
        except UserError as error:
            same = all(torch.equal(*pair) for pair in zip(before, trainer.buffers.params, strict=True))
            trainer.close()
            return str(error), same
    raise AssertionError("no step has failed")


@pytest.mark.parametrize(
    ("reward", "layout", "said"),
    [
        ("raises", "dp2", r"prompts.jsonl:8: reward=\S+ raised ZeroDivisionError: float division by zero; the co"),
        ("nan", "dp2", r"prompts.jsonl:8: reward=\S+ gave nan, which is no finite number; the completion was '"),
        ("ends", "pp2", r"prompts.jsonl:\d+: reward=\S+ raised SystemExit: 0; the completion was '"),
        ("text", "tp2", r"prompts.jsonl:\d+: reward=\S+ gave '1.0', which is no finite number; the completion"),
    ],
)
def test_a_reward_that_fails(reward: str, layout: str, said: str, keys: dict[str, Any], pool: WorkerPool) -> None:
    """On one prompt of one replica: every rank says the same line, before the update."""
    axes = {f"parallel.{axis}": size for axis, size in Layout.parse(layout).items()}
    config = tiny_config("", **keys | axes | {"reward": f"tests.tasks.rewards:{reward}", "task.kl": 0.0})
    ranks = pool.run(failed, 2, config, 0.0)
    [[line, same]] = set(ranks)
    assert same and "\n" not in line
    assert re.search(said, line), line


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_another_model_than_the_one_that_wrote(layout: str, keys: dict[str, Any], pool: WorkerPool) -> None:
    """A gap on one rank stops all of them before the update."""
    axes = {f"parallel.{axis}": size for axis, size in Layout.parse(layout).items()}
    ranks = pool.run(failed, 2, tiny_config("", **keys | axes), 1e-6)
    [[line, same]] = set(ranks)
    assert same and line.startswith("step 1: a token's log-probability is 1.0e-06 nats apart"), line


def went_on(rank: int, world_size: int, config: TrainConfig, folder: str, load_from: str) -> list[dict[str, float]]:
    """Figures of steps 1 to 4, the state after step 2 saved, or of steps 3 and 4 from that state."""
    trainer = Trainer(config, rank)
    first = load(load_from, trainer.optimizer, config).step + 1 if load_from else 1
    said = []
    for step in range(first, 5):
        done = trainer.step(step)
        said.append(without(done.said) | {"grad_norm": done.result.grad_norm})
        if step == 2 and not load_from:
            save(Path(folder), trainer.optimizer, config, step)
    trainer.close()
    return said


def test_it_goes_on(keys: dict[str, Any], pool: WorkerPool, tmp_path: Path) -> None:
    """From a checkpoint, in another layout, with the same completions: what is drawn depends on the sample alone."""
    config = tiny_config("", **keys | {"parallel.dp": 2})
    whole = pool.run(went_on, 2, config, str(tmp_path), "")[0]
    split = changed(config, {"parallel.dp": 1, "parallel.tp": 2})
    rest = pool.run(went_on, 2, split, "", str(tmp_path))[0]
    assert len(rest) == 2
    for expected, found in zip(whole[2:], rest, strict=True):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_it_learns(keys: dict[str, Any]) -> None:
    """One process, whose steps every layout computes: more letters are rewarded, and come."""
    more = {"reward": "tests.tasks.rewards:letters", "task.kl": 0.0, "train.dtype": "fp32", "train.steps": 25}
    more |= {"train.global_batch_size": 32, "train.micro_batch_size": 32, "task.group": 8}
    trainer, _, _ = one(keys, **more, **{"optim.lr": 2e-2, "optim.schedule": "constant"})
    rewarded = [trainer.step(step).said["reward"] for step in range(1, 26)]
    assert np.mean(rewarded[-5:]) > np.mean(rewarded[:5]) + 0.2, rewarded
    trainer.close()


def test_without_a_difference_nothing_is_learned(keys: dict[str, Any]) -> None:
    more = {"reward": "tests.tasks.rewards:same", "task.kl": 0.0}
    trainer, _, _ = one(keys, **more)
    done = trainer.step(1)
    assert done.said["flat_groups"] == 1.0 and done.result.grad_norm == 0.0
    trainer.close()


def test_layouts_that_nothing_tells_apart_are_not_said_to_agree(
    keys: dict[str, Any], pool: WorkerPool, tmp_path: Path
) -> None:
    same = keys | {"reward": "tests.tasks.rewards:same", "task.kl": 0.0}
    config = verify_config(keys["data.prefix"], ["dp2"], **same)
    with pytest.raises(UserError, match=r"^verify: all gradients of 2 steps are 0, .* give a reward that tells"):
        compare(pool, tmp_path, config)
    assert relative(0.0, 0.0) == 0.0 and relative(1e-30, 0.0) == math.inf and math.isnan(relative(math.nan, 0.0))
    assert relative(1.0, 4.0) == 0.25


def test_rewards_by_name() -> None:
    assert find_reward("tests.tasks.rewards:same").function is rewards.same
    with pytest.raises(ConfigError, match=r"two: can't be called with \(prompt, completion, record\)"):
        find_reward("tests.tasks.rewards:two")
    for name, problem in (
        ("tests.tasks.rewards:later", r"is async, which gives no number; make it an ordinary function"),
        (
            "tests.tasks.rewards:mixt",
            r"tests.tasks.rewards has no mixt \(it is .*rewards.py\); did you mean \S+:mixed\?",
        ),
        ("tests.tasks.leaves:reward", r"tests.tasks.leaves can't be imported \(SystemExit: 4\)"),
    ):
        with pytest.raises(ConfigError, match=rf"^reward={name}: {problem}"):
            find_reward(name)


def test_what_a_reward_says_is_one_short_line() -> None:
    """Also of values that can't be shown, and of long ones."""

    def silent(*_: Any) -> float:
        raise rewards.Silent

    for function, problem in (
        (silent, r"raised Silent: a Silent that can't be shown \(RuntimeError\)"),
        (lambda *_: 10**400, r"gave 10{199}..., which is no finite number"),
        (lambda *_: [1.0] * 999, r"gave \[1.0, .{190,210}..., which is no finite number"),
        (lambda *_: 1e308, r"gave 1e\+308, whose squares can't be added up; give at most 1e\+100"),
    ):
        with pytest.raises(UserError) as found:
            Reward("mine:reward", function)(Prompt([1], {"prompt": "a"}, "FILE:3"), "one\ntwo")
        line = str(found.value)
        assert re.search(rf"^FILE:3: reward=mine:reward {problem}; the completion was 'one\\ntwo'$", line), line


def looked_into(rank: int, world_size: int, config: TrainConfig) -> dict[str, Tensor]:
    """What passes while completions are learned from, beside what passes while they are written."""
    trainer = Trainer(config, rank)
    sites = ["layers.0.attention.weights", "layers.1"]
    with Capture(trainer, sites, gradients=True, written=False) as seen:
        trainer.step(1)
    found = {name: seen[name] for name in (*sites, "layers.1.gradient")}
    trainer.close()
    return found


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_what_it_learns_from_can_be_seen(layout: str, keys: dict[str, Any], pool: WorkerPool) -> None:
    """Rows are completions, by number, though written in slots of a cache, with other tokens beside them."""
    axes = {f"parallel.{axis}": size for axis, size in Layout.parse(layout).items()}
    [expected] = pool.run(looked_into, 1, tiny_config("", **keys))
    assert [*expected["layers.0.attention.weights"].shape] == [16, 24, 4, 24]
    for found in pool.run(looked_into, 2, tiny_config("", **keys | axes)):
        for name, x in expected.items():
            assert (found[name] - x).abs().max() <= 1e-12 * x.abs().max() > 0, name


def test_examples_write_nothing(keys: dict[str, Any]) -> None:
    """What a GPU compiles kernels with: shapes of a step's batches, without a word or a reward."""
    trainer, _, task = one(keys)
    rewards.CALLS.clear()
    examples = task.examples()
    assert not rewards.CALLS and len(examples) == 2
    [batch, *_] = task.batches(1)
    assert {name: (x.shape, x.dtype) for name, x in examples[0].items()} == {
        name: (x.shape, x.dtype) for name, x in batch.items()
    }
    trainer.close()
