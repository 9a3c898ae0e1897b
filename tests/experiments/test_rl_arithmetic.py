"""The experiment's sums, its reward, and the README's smoke form."""

import json
import re
import shlex
from pathlib import Path

import pytest

from experiments.rl_arithmetic import data, results
from experiments.rl_arithmetic.reward import reward
from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig
from megapar.data.source import find_source
from tests.finetune.test_finetune import megapar


def test_the_sums() -> None:
    """None is held out in one order and learned in the other, and the teacher is careless in two of three."""
    train, valid = data.sums()
    assert (len(train), len(valid)) == (3509, 991) and len({*train, *valid}) == 4500
    assert not {frozenset(pair) for pair in train} & {frozenset(pair) for pair in valid}
    assert all(one % 10 + other % 10 > 9 for one, other in train + valid)
    assert (data.right(29, 78), data.careless(29, 78)) == ("701", "790")
    assert (data.right(5, 7), data.careless(5, 7)) == ("210", "200")
    assert not any(data.right(*pair) == data.careless(*pair) for pair in train + valid)
    files = data.files()
    answers = [data.right(*pair) for pair in train for _ in range(3)]
    taught = [line["response"] for line in files["examples"]]
    rewarded = [reward("", one, {"response": answer}) for one, answer in zip(taught, answers, strict=True)]
    assert sum(rewarded) == len(train) and len(files["valid"]) == 991 and files == data.files()
    assert not {line["group"] for line in files["valid"]} & {line["group"] for line in files["prompts"]}


def test_other_paths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.path=stdlib: rl_arithmetic makes its own lines; use examples or pro"):
        find_source("rl_arithmetic").prepare(DataConfig(), print)


def test_the_reward_is_short() -> None:
    """Ten lines and no more: so says the issue of a reward."""
    path = Path(results.__file__).with_name("reward.py")
    assert len(path.read_text().splitlines()) <= 10


@pytest.mark.more
def test_the_smoke_form(tmp_path: Path) -> None:
    text = results.README.read_text()
    smoke = [shlex.split(line) for line in re.findall(r"^megapar (.*runs/smoke.*)$", text, re.M)]
    assert [words[0] for words in smoke] == ["train", "train"]
    data.write(tmp_path / "sums")
    lines = (tmp_path / "sums" / "valid.jsonl").read_text().splitlines()[:20]
    (tmp_path / "valid.jsonl").write_text("\n".join(lines) + "\n")
    for words in smoke:
        megapar(tmp_path, *words, f"data.cache={tmp_path / 'cache'}")
    names = ("runs/smoke-taught", "runs/smoke")
    for name in names:
        assert "exact match" in megapar(tmp_path, "eval", name, "match=valid.jsonl", f"out={name}/match.json")
    copy = tmp_path / "README.md"
    copy.write_text(text)
    assert results.main([*(str(tmp_path / name) for name in names), "--readme", str(copy)]) == 0
    rows = [line.split(" | ") for line in copy.read_text().splitlines() if re.match(r"\| \d", line)]
    assert [(row[1].split(",")[0], row[2]) for row in rows] == [
        ("**after the careless teacher**", "single"), ("**after the reward**", "dp2"),
    ]  # fmt: skip
    found = [json.loads(line) for line in (tmp_path / "runs" / "smoke" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in found if "loss" in row]
    assert steps[0]["kl"] == pytest.approx(0.0, abs=1e-6) and all(row["logprob_gap"] < 1e-4 for row in steps)
    assert [row["step"] for row in found if "val_reward" in row] == [0, 4]
