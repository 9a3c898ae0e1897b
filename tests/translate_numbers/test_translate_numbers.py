"""The experiment's numbers, and the README's smoke form."""

import json
import re
import shlex
from pathlib import Path

import pytest

from experiments.translate_numbers import baselines, data, results
from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig
from megapar.data.source import find_source
from tests.finetune.test_finetune import megapar


def test_the_lines() -> None:
    train, valid = data.lines()
    assert (len(train), len(valid)) == (12 * 9500, 500)
    numbers = [{line["group"] for line in lines} for lines in (train, valid)]
    assert not numbers[0] & numbers[1] and len(numbers[0] | numbers[1]) == 10_000
    assert not {line["source"] for line in train} & {line["source"] for line in valid}
    assert {"source": "de: twenty-one", "target": "einundzwanzig", "group": "21"} in train + valid


def test_the_baseline() -> None:
    words = {
        2000: ("two thousand", "zweitausend"),
        5: ("five", "fünf"),
        2005: ("two thousand and five", "zweitausendfünf"),
    }
    known = [{"source": f"de: {source}", "target": target} for source, target in words.values()]
    new = [{"source": "de: five thousand and two", "target": "fünftausendzwei"}]
    more = [{"source": "de: five thousand", "target": "fünftausend"}, {"source": "de: two", "target": "zwei"}]
    assert baselines.two_known_numbers(known, new) == 0.0
    assert baselines.two_known_numbers([*known, *more], new) == 1.0


def test_other_paths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^data.path=stdlib: translate_numbers makes its own lines; use numbers"):
        find_source("translate_numbers").prepare(DataConfig(), print)


@pytest.mark.more
def test_the_smoke_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = results.README.read_text()
    commands = [shlex.split(line) for line in re.findall(r"^megapar (.*runs/smoke.*)$", text, re.M)]
    assert [words[0] for words in commands] == ["train", "eval"]
    train, valid = data.lines()
    (tmp_path / "lines.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in valid[:20]))
    megapar(tmp_path, *commands[0], f"data.cache={tmp_path / 'cache'}")
    assert "exact match" in megapar(tmp_path, *commands[1])
    monkeypatch.setattr(data, "lines", lambda: (train[:1000], valid))
    copy = tmp_path / "README.md"
    copy.write_text(text)
    assert results.main([str(tmp_path / "runs" / "smoke"), "--readme", str(copy)]) == 0
    [ours, word] = [line.split(" | ") for line in copy.read_text().splitlines() if re.match(r"\| \d", line)]
    assert ours[2:4] == ["pp2", "1E \\| 1D"] and word[1] == "two known numbers beside each other"
