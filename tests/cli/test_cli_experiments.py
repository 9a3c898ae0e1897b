"""`experiment=NAME` from conf/ and from experiments/ folders, and what `verify` takes of one."""

from collections.abc import Callable
from pathlib import Path

import pytest

import megapar
from megapar.cli import main
from megapar.cli.compose import CONF, compose, group_files, split
from megapar.config import ConfigError, UserError

OWN = """# @package _global_
# megapar train experiment=own
defaults:
  - override /model: gpt2_tiny
  - override /parallel: tp3
parallel:
  zero: 1
optim:
  lr: 5e-3
train:
  seq_length: 32
run:
  name: own-${train.steps}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Write an experiment into the current folder, an empty one at first: here(name, text)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda name, text: write(Path("experiments"), name, text)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name / "experiment.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another checkout that megapar says it is installed from."""
    root = tmp_path / "checkout"
    (root / "megapar").mkdir(parents=True)
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(megapar, "__file__", str(root / "megapar" / "__init__.py"))
    return root


def test_one_of_the_current_folder_is_like_one_of_conf(here: Callable) -> None:
    here("own", OWN)
    config = compose("train", split(["experiment=own", "train.steps=9"]))
    assert (config.model.position, config.parallel.tp, config.parallel.zero) == ("learned", 3, 1)
    assert (config.optim.lr, config.train.seq_length, config.train.steps) == (5e-3, 32, 9)
    assert config.run.name == "own-9"  # what it refers to is what was typed
    assert compose("train", split(["experiment=own", "model=tiny", "optim.lr=1"])).optim.lr == 1.0
    assert compose("train", split(["experiment=own", "debug=fp64"])).train.dtype == "fp64"
    assert compose("train", split(["experiment=demo"])).run.name == "demo"


@pytest.mark.parametrize("name", group_files("verify")["experiment"])
def test_verify_takes_the_model_of_an_experiment(name: str) -> None:
    """And nothing of its own model, such as the size of its vocabulary."""
    assert (
        compose("verify", split([f"experiment={name}"])).model == compose("train", split([f"experiment={name}"])).model
    )


def test_one_of_the_checkout_is_found_from_anywhere(here: Callable, checkout: Path) -> None:
    write(checkout / "experiments", "far", OWN)
    here("near", OWN)
    assert compose("train", split(["experiment=far"])).parallel.tp == 3
    assert group_files("train")["experiment"] == ["demo", "far", "near"]
    assert group_files("verify")["experiment"] == ["demo", "far", "near"]


def test_what_is_installed_without_a_checkout_has_no_neighbours(here: Callable, checkout: Path) -> None:
    write(checkout / "experiments", "far", OWN)
    (checkout / "pyproject.toml").unlink()
    assert "far" not in group_files("train")["experiment"]


def test_an_unknown_name_lists_every_place(here: Callable, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(checkout / "experiments", "far", OWN)
    write(checkout / "experiments", "wide", OWN)
    here("own", OWN)
    assert main(["train", "experiment=ownn"]) == 2
    places = f"conf/experiment/ has demo; experiments/ has own; {checkout}/experiments/ has far, wide"
    assert capsys.readouterr().err == f"experiment=ownn: no such file; did you mean own? {places}\n"


def test_the_checkout_as_current_folder_is_listed_once(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(checkout / "experiments", "far", OWN)
    monkeypatch.chdir(checkout)
    with pytest.raises(ConfigError, match=r"conf/experiment/ has demo; experiments/ has far$"):
        compose("train", split(["experiment=x"]))


def test_two_that_differ_are_refused_and_copies_are_not(here: Callable, checkout: Path) -> None:
    far = write(checkout / "experiments", "own", OWN)
    here("own", OWN)
    assert compose("train", split(["experiment=own"])).parallel.tp == 3
    far.write_text(OWN.replace("tp3", "tp5"))
    with pytest.raises(ConfigError, match=rf"own: experiments/own/experiment.yaml and {far} differ; rename one"):
        compose("train", split(["experiment=own"]))
    assert compose("train", split(["experiment=demo"])).run.name == "demo"  # nobody else minds
    assert compose("train", split([])).run.name == "run"


def test_a_name_of_conf_is_not_taken_over(here: Callable) -> None:
    text = (CONF / "experiment" / "demo.yaml").read_text()
    path = here("demo", text)
    assert compose("train", split(["experiment=demo"])).train.steps == 120
    path.write_text(text.replace("120", "7"))
    with pytest.raises(ConfigError, match=r"demo.yaml and experiments/demo/experiment.yaml differ"):
        compose("train", split(["experiment=demo"]))


@pytest.mark.parametrize("text,words", [("a: [", "not readable as YAML"), ("- a", "not an experiment")])
def test_one_that_can_not_be_read_is_named(text: str, words: str, here: Callable) -> None:
    here("broken", text)
    assert compose("train", split(["experiment=demo"])).run.name == "demo"
    with pytest.raises(UserError, match=f"^experiments/broken/experiment.yaml: {words}") as refusal:
        compose("train", split(["experiment=broken"]))
    assert "\n" not in str(refusal.value)


def test_its_unknown_keys_are_refused(here: Callable) -> None:
    here("wrong", "train:\n  stepz: 3\n")
    with pytest.raises(ConfigError, match=r"train.stepz"):
        compose("train", split(["experiment=wrong"]))


@pytest.mark.parametrize("choice", ["one,two", "choice(one,two)", "glob([one,tw*])"])
def test_a_sweep_over_experiments(choice: str, run: Callable, tmp_path: Path) -> None:
    for name, lr in (("one", 1), ("two", 3)):
        write(tmp_path / "experiments", name, f"optim:\n  lr: {lr}\n")
    done = run("lr_fails", "train", "-m", "run.dir=sweep", "train.steps=1", f"experiment={choice}")
    assert done.code == 0, done.err
    assert "2 done" in done.out and "1.0000" in done.out and "3.0000" in done.out


def test_verify_keeps_its_own_steps_and_batch() -> None:
    plain, demo = (compose("verify", split(words)) for words in ([], ["experiment=demo"]))
    for section, key in (
        ("train", "steps"),
        ("train", "global_batch_size"),
        ("train", "micro_batch_size"),
        ("train", "trace"),
        ("optim", "warmup_steps"),
    ):
        assert getattr(getattr(demo, section), key) == getattr(getattr(plain, section), key)
    assert (demo.train.steps, demo.train.seq_length, demo.optim.lr) == (3, 64, 4e-3)  # the rest is the experiment's
    assert (demo.parallel.zero, demo.model, demo.run.name) == (1, compose("train", split(["model=demo"])).model, "demo")


def test_verify_takes_what_is_typed() -> None:
    typed = ["train.steps=5", "experiment=demo", "train.global_batch_size=24"]
    config = compose("verify", split(typed))
    assert (config.train.steps, config.train.global_batch_size, config.train.micro_batch_size) == (5, 24, 1)
    assert compose("verify", split(["experiment=demo", "debug=short"])).train.steps == 2
    assert compose("verify", split(["experiment=demo", "train=default"])).train.steps == 100


def test_an_experiment_of_a_folder_is_verified_by_its_own_references(here: Callable) -> None:
    here("own", OWN)
    assert compose("verify", split(["experiment=own"])).run.name == "own-3"


@pytest.mark.parametrize("name", group_files("verify")["experiment"])
def test_every_experiment_can_be_verified(name: str) -> None:
    from megapar.config import check, resolve

    check(resolve(compose("verify", split([f"experiment={name}"])), vocab_size=1024, max_token=1023))
