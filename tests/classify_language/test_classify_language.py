"""The experiment's data, its baseline, and the README's smoke form: from the command line to the README's table."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import runs
from experiments.classify_language import results
from experiments.classify_language.baselines import accuracy, naive_bayes, ngrams
from experiments.classify_language.data import LANGUAGES, LEAST, translations
from megapar.config.errors import ConfigError
from megapar.config.schema import DataConfig
from megapar.data.records import Records
from megapar.data.source import find_source

SOURCE = find_source("classify_language")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_the_strings() -> None:
    """Thirty languages; a message's translations are all held out, or none is."""
    strings = translations()
    assert len(strings) == 12_729 and {one.language for one in strings} == set(LANGUAGES) and len(LANGUAGES) == 30
    assert min(len(one.text) for one in strings) == LEAST
    sides = [{one.message for one in strings if one.held_out == out} for out in (True, False)]
    assert not sides[0] & sides[1] and sum(one.held_out for one in strings) == 2599


def test_nothing_that_is_held_out_is_text_to_learn_from(cache: Path) -> None:
    data = DataConfig(path="labels", cache=str(cache), vocab_size=900)
    prefix = SOURCE.prepare(data, lambda line: None).prefix
    assert [len(Records(prefix, split)) for split in ("train", "valid")] == [10_130, 2599]
    assert Records(prefix, "train").labels == sorted(LANGUAGES)
    [folder] = cache.glob("classify_language-*")
    text = "\n".join(path.read_text() for path in sorted((folder / "text").iterdir())).splitlines()
    lines = {line for one in translations() if not one.held_out for line in one.text.splitlines()}
    assert set(text) <= lines | {""} and len(text) > 10_000


def test_other_paths_are_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^data.path=stdlib: classify_language has strings, to pre-train on, and "):
        SOURCE.prepare(DataConfig(cache=str(cache)), print)
    translations.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"which is not installed; pip install 'megapar\[experiments\]'"):
        translations()


def test_naive_bayes() -> None:
    assert list(ngrams("ab", 2)) == [" ", "a", "b", " ", " a", "ab", "b "]
    texts, labels = ["aab", "aba", "ccd", "dcc"], ["x", "x", "y", "y"]
    assert naive_bayes(texts, labels, ["ab", "cd", "a?"], longest=2) == ["x", "y", "x"]
    assert accuracy(["x", "y"], ["x", "x"]) == 0.5


@pytest.fixture(scope="module")
def smoke(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that the README's two commands end in, made in a folder that is not the checkout."""
    commands = re.findall(r"^megapar train (.* run\.dir=runs/smoke\S*)$", results.README.read_text(), re.M)
    here = tmp_path_factory.mktemp("here")
    assert len(commands) == 2
    for command in commands:
        words = [sys.executable, "-m", "megapar.cli", "train", *shlex.split(command), f"data.cache={cache}"]
        environment = os.environ | {"PYTHONPATH": str(results.ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=here, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr + done.stdout
    return here / "runs" / "smoke"


def test_the_table(smoke: Path, tmp_path: Path) -> None:
    """A minute's worth of learning in seconds: twice as good as a guess, and far from the n-grams."""
    run = runs.Run.read(smoke)
    assert 2 / 30 < run.last("val_accuracy") < 0.9
    assert run.config.data.tokenizer.endswith("runs/smoke-strings/tokenizer.model")
    copy = tmp_path / "README.md"
    copy.write_text(results.README.read_text())
    assert results.main([str(smoke), "--readme", str(copy)]) == 0
    rows = [line.split(" | ") for line in copy.read_text().splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 5 and "pre-trained" in rows[-1][1] and rows[-1][2:5] == ["dp2", "1234", "60"]
    bayes = [float(row[0][2:-1]) for row in rows if "naive Bayes" in row[1]]
    assert bayes == sorted(bayes, reverse=True) and bayes[0] > 94


def test_other_runs_are_refused(smoke: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert results.main([str(smoke.with_name("smoke-strings"))]) == 2
    assert "no run of this experiment that classifies" in capsys.readouterr().err
