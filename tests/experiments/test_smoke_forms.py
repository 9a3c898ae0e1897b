"""The smoke forms of experiments that write about images and sound, as their READMEs have them."""

import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

import experiments.caption_shapes.data as shapes
import experiments.caption_shapes.results as shapes_results
import experiments.question_answering.data as questions
import experiments.question_answering.results as questions_results
import experiments.transcribe_digits.data as digits
import experiments.transcribe_digits.results as digits_results
from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig
from megapar.data.source import find_source
from tests.finetune.test_finetune import megapar

EXPERIMENTS = {
    "caption_shapes": (shapes, shapes_results),
    "transcribe_digits": (digits, digits_results),
    "question_answering": (questions, questions_results),
}


@pytest.mark.more
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_smoke_form(name: str, tmp_path: Path) -> None:
    data, results = EXPERIMENTS[name]
    (tmp_path / "shards").mkdir()
    data.build(tmp_path / "shards", 1, {"train": 60, "valid": 8})
    text = results.README.read_text()
    train, evaluate = [shlex.split(line) for line in re.findall(r"^megapar (.*runs/smoke.*)$", text, re.M)]
    megapar(tmp_path, *train, f"data.cache={tmp_path / 'cache'}")
    assert "exact match" in megapar(tmp_path, *evaluate)
    copy = tmp_path / "README.md"
    copy.write_text(text)
    assert results.main([str(tmp_path / "runs" / "smoke"), "--readme", str(copy)]) == 0
    [row] = [line.split(" | ") for line in copy.read_text().splitlines() if re.match(r"\| \d+.\d% .*pp2", line)]
    assert len(row) == 1 + len(results.COLUMNS) + 6 and "embedding to" in row[-5]


def kinds_of(results: ModuleType, right: str, text: str = "") -> str:
    [kind] = results.kinds({"right": right, "text": text})
    assert kind in results.COLUMNS
    return str(kind)


def test_kinds_of_samples() -> None:
    assert kinds_of(shapes_results, "at the top, a large yellow circle left of a small red star") == "two things"
    assert kinds_of(digits_results, "one two three four").startswith("4 words")
    assert kinds_of(digits_results, "one two").startswith("1, 2, 3 or 5")
    assert kinds_of(questions_results, "red", "what colour is the star?") == "about a picture"
    assert kinds_of(questions_results, "the cook", "the cook has the coat. who has the coat?") == "about a passage"


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no folder with train/ and valid/; give one that data.py wrote, or made"):
        find_source("caption_shapes").prepare(DataConfig(path=str(tmp_path)), print)
