"""Sources by name: those that come with megapar, and those of an experiment's folder."""

from pathlib import Path

import numpy as np
import pytest

from megapar.cli.finish import finish
from megapar.config.errors import ConfigError, UserError
from megapar.config.keys import changed
from megapar.data.order import SampleOrder, shuffled
from megapar.data.source import Source, find_source
from megapar.train.trainer import Trainer
from tests.tiny import tiny_config

COUNTING = '''
"""Every sample counts on from its own number, modulo 50."""
import numpy as np
from megapar.data.order import SampleOrder
from megapar.data.source import Prepared, Source


class Counting:
    num_samples = 30

    def __init__(self, config, split):
        self.length = config.train.seq_length
        self.order = SampleOrder(self.num_samples, config.train.seed, shuffle=split == "train")

    def batch(self, indices):
        starts = np.array([self.order.item(index) for index in indices])
        return (starts[:, None] + np.arange(self.length + 1)) % 50


SOURCE = Source("counting", "counts", lambda config, say: Prepared("", vocab_size=50, max_token=49), Counting)
'''


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty experiments/ folder of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "counting").mkdir(parents=True)
    return tmp_path / "experiments"


def test_the_source_that_comes_with_megapar(tokens: str) -> None:
    source = find_source("tokens")
    assert isinstance(source, Source)
    config = tiny_config(tokens)
    samples = source.open(config, "train")
    assert samples.batch([0, 3]).shape == (2, config.train.seq_length + 1)


def test_an_experiment_brings_its_own(experiments: Path, tokens: str) -> None:
    """A model learns from it, and it is the same batch whichever rank asks."""
    (experiments / "counting" / "data.py").write_text(COUNTING)
    assert find_source("counting").prepare(tiny_config(tokens).data, print).vocab_size == 50
    values = {"data.source": "counting", "optim.lr": 0.05, "train.steps": 30, "train.dtype": "fp32"}
    trainer = Trainer(changed(tiny_config(tokens), values), 0)
    losses = [trainer.step(step).loss for step in range(1, 31)]
    assert losses[-1] < 0.5 * losses[0]
    [batch, *_] = trainer.task.batches(1)
    assert torch_equal(batch["ids"][:, 1:], batch["labels"][:, :-1])
    trainer.close()


def test_what_a_source_leaves_out_is_said_by_the_launcher(
    experiments: Path, monkeypatch: pytest.MonkeyPatch, tokens: str
) -> None:
    text = COUNTING.replace("num_samples = 30", 'num_samples, left_out = 30, "1 of 31 samples is bad"')
    (experiments / "counting" / "data.py").write_text(text)
    said: list[str] = []
    monkeypatch.setattr("megapar.cli.finish.say", said.append)
    finish(changed(tiny_config(tokens), {"data.source": "counting", "train.eval_every": 2}), world_size=1)
    assert said == ["data: train: 1 of 31 samples is bad", "data: valid: 1 of 31 samples is bad"]


def torch_equal(a: object, b: object) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_what_is_missing_or_faulty_is_named(experiments: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.source=countin: no such source; there are .*tokens.*, or write"):
        find_source("countin")
    (experiments / "counting" / "data.py").write_text("OTHER = 1\n")
    with pytest.raises(UserError, match=r"counting/data.py: declares no source"):
        find_source("counting")


@pytest.mark.parametrize("text", ["x = 1 +", "raise RuntimeError('no data today')"])
def test_a_file_that_can_not_be_imported_is_one_line(text: str, experiments: Path) -> None:
    (experiments / "counting" / "data.py").write_text(text)
    with pytest.raises(UserError, match=r"counting/data.py: can't be used as a source") as refused:
        find_source("counting")
    assert "\n" not in str(refused.value)


def test_two_sources_of_one_name_are_refused(experiments: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they say the same."""
    other = experiments.parent / "checkout" / "experiments"
    (other / "counting").mkdir(parents=True)
    for folder in (experiments, other):
        (folder / "counting" / "data.py").write_text(COUNTING)
    folders = {"experiments/": experiments, "checkout/experiments/": other}
    monkeypatch.setattr("megapar.config.experiments.experiment_folders", lambda: folders)
    assert find_source("counting").name == "counting"
    (other / "counting" / "data.py").write_text(COUNTING.replace("% 50", "% 49"))
    with pytest.raises(ConfigError, match=r"data.source=counting: .*differ; rename one of the folders"):
        find_source("counting")


def test_the_order_is_apart_from_what_is_ordered() -> None:
    order = SampleOrder(10, seed=3, shuffle=True)
    epoch = [order.item(index) for index in range(10)]
    assert sorted(epoch) == list(range(10)) and epoch != list(range(10))
    assert epoch == [shuffled(position, 10, 3, 0) for position in range(10)]
    assert [order.item(index) for index in range(10, 20)] != epoch
    assert [SampleOrder(10, 3, shuffle=False).item(index) for index in (0, 9, 10)] == [0, 9, 0]
    with pytest.raises(ValueError, match="counted from 0"):
        order.item(-1)
