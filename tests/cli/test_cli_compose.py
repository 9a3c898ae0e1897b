"""What is composed: every file in conf/, verbatim keys, what --info and --help print, and how fast."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megapar.cli import main
from megapar.cli.command import commands
from megapar.cli.compose import CONF, compose, group_files, split
from megapar.cli.help import config_with_help
from megapar.cli.main import understand
from megapar.config import ConfigError, Layout, TrainConfig, check, parse, resolve, to_dict, with_layout
from megapar.config.file import dump, loads
from megapar.config.keys import groups, keys
from megapar.config.schema import PartOptions
from megapar.schedule.build import build
from megapar.schedule.table import write

COMMANDS = {name: command.config for name, command in commands().items()}
# A group's file on its own may need more than the defaults of the others.
COMPANIONS = {
    "data/text": ["data.path=folder"],
    "data/tokens": ["data.path=prefix"],
    "parallel/auto": ["devices=8"],
    "model/multimodal_tiny": ["task=multimodal_lm"],
    "task/multimodal_classify": ["model=multimodal_tiny"],
    "task/multimodal_lm": ["model=multimodal_tiny"],
    "task/policy": ["reward=my_reward:reward"],
    "task/seq2seq": ["model=t5_tiny"],
}
WITH_ENCODER = ("encoder_decoder_tiny", "t5_tiny", "t5_small", "t5_base", "t5_v1_1_small")
COMPANIONS |= {f"model/{name}": ["task=seq2seq"] for name in WITH_ENCODER}
FILES = [
    (command, group, name)
    for command in COMMANDS
    for group, names in group_files(command).items()
    for name in names
    if command == "train"  # the other commands choose from the same files
]


@pytest.mark.parametrize(("command", "group", "name"), FILES)
def test_every_file_composes_and_validates(command: str, group: str, name: str) -> None:
    more = COMPANIONS.get(f"{group}/{name}", [])
    config = compose(command, split([f"{group}={name}", *more]))
    resolved = resolve(config, vocab_size=1024, max_token=1023)
    check(resolved, task=resolved.model.causal)  # no task learns encoders yet
    assert loads(type(config), dump(resolved)) == resolved


@pytest.mark.parametrize("command", COMMANDS)
def test_root_file_composes(command: str) -> None:
    assert isinstance(compose(command, split([])), COMMANDS[command])


def test_no_file_is_left_out() -> None:
    """Every group of conf/ is in train's defaults list, and every file says in its head which command uses it."""
    assert set(group_files("train")) == {path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_"}
    for path in CONF.rglob("*.yaml"):
        head = path.read_text().splitlines()[:2]
        assert any(line.startswith("# megapar ") for line in head), path


def test_files_only_say_what_they_mean() -> None:
    """A key in a file that the schema does not know would only be found when that file is used."""
    for path in CONF.glob("*/*.yaml"):
        text = path.read_text()
        content = yaml.safe_load(text) or {}
        content.pop("defaults", None)
        overlay = "# @package _global_" in text
        parse(TrainConfig, content if overlay else {path.parent.name: content})


def test_demo_is_three_dimensional() -> None:
    config = compose("train", split(["experiment=demo"]))
    assert (config.parallel.tp, config.parallel.pp, config.parallel.dp) == (2, 2, 2)


@pytest.mark.parametrize("name", ["tp2pp2dp2", "dp2tp2", "pp4", "tp8"])
def test_a_layout_needs_no_file(name: str) -> None:
    config = compose("train", split([f"parallel={name}", "parallel.zero=1"]))
    assert config.parallel.layout == Layout.parse(name)
    assert config.parallel.dp == Layout.parse(name)["dp"]  # not derived: what the name leaves out is 1
    of_experiment = compose("train", split(["experiment=demo", f"parallel={name}"])).parallel
    assert (of_experiment.layout, of_experiment.zero) == (Layout.parse(name), 1)
    assert compose("train", split([f"parallel={name}", "parallel.tp=3"])).parallel.tp == 3  # a key wins over a choice


def test_later_files_and_overrides_win() -> None:
    config = compose("train", split(["experiment=demo", "debug=fp64", "train.steps=7"]))
    assert (config.train.dtype, config.train.steps, config.run.name) == ("fp64", 7, "debug-fp64")
    assert config.parallel.tp == 2  # from the experiment


def test_verbatim_keys_are_not_hydra_grammar() -> None:
    text = "def f(x): return {x}, $[1] ${oops} 'a\"b' = ~"
    config = compose("generate", split([f"prompt={text}", "run.dir=a,b [c]"]))
    assert (config.prompt, config.run.dir) == (text, "a,b [c]")


@pytest.mark.parametrize(
    "words", ["RUN prompt=x", "run.dir=RUN prompt=x", "RUN prompt=x run.dir=RUN/", "RUN --info prompt=x"]
)
def test_a_folder_needs_no_key(words: str) -> None:
    call = understand(["generate", *words.split(), "prompt=x"])
    assert compose("generate", split(call.arguments)).run.dir in ("RUN", "RUN/")
    assert understand(["generate", "RUN", "--help"]).info == "help"
    text = understand(["generate", "a, {b}", "prompt=c"]).arguments
    assert compose("generate", split(text)).run.dir == "a, {b}"


def test_a_repeated_verbatim_key_takes_the_last_value() -> None:
    assert compose("train", split(["out=a=b", "run.dir=x", "out=c=d"])).out == "c=d"


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = compose("train", split(["run.dir=~/x", "out=~/y", "checkpoint.load=~/z"]))
    assert (config.run.dir, config.out, config.checkpoint.load) == ("/home/me/x", "/home/me/y", "/home/me/z")
    assert compose("train", split(["run.dir=a~/x"])).run.dir == "a~/x"


def test_a_list_of_layers_per_stage_holds_where_verify_has_so_many_stages() -> None:
    config = resolve(compose("verify", split(["layouts=[pp2,tp2]", "pipeline.partition=[3,1]", "model.layers=4"])))
    check(config)
    partitions = [with_layout(config, Layout.parse(name)).pipeline.partition for name in ("pp2", "tp2")]
    assert partitions == [[3, 1], "uniform"]


def test_lists_and_quoted_text() -> None:
    config = compose("train", split(["pipeline.partition=[1,3]", "logger.wandb.project=x, y"]))
    assert (config.pipeline.partition, config.logger.wandb.project) == ([1, 3], "x, y")
    assert compose("verify", split(["layouts=['tp2',pp2]"])).layouts == ["tp2", "pp2"]


def test_compose_leaves_no_hydra_state() -> None:
    from hydra.core.global_hydra import GlobalHydra

    compose("train", split([]))
    assert not GlobalHydra.instance().is_initialized()


def test_info_config_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--info", "config", "model=gpt2_tiny", "run.dir=a: b # c", "pipeline.partition=[2,2]"]) == 0
    shown = capsys.readouterr().out
    config = parse(TrainConfig, yaml.safe_load(shown))
    assert config.model.position == "learned"
    assert (config.run.dir, config.pipeline.partition) == ("a: b # c", [2, 2])
    for key, field in keys(TrainConfig).items():
        assert f"# {field.help}" in shown, key
    for text in groups(TrainConfig).values():
        assert f"# {text}\n" in shown


def test_info_keys_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--info=keys"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(keys(COMMANDS["verify"]))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert commands()[command].about in shown
    for line, _ in commands()[command].examples:
        assert line in shown
    for group in group_files(command):
        assert f"  {group} " in shown
    assert set(commands()[command].most_used) <= set(keys(COMMANDS[command]))


def test_help_of_a_command_with_subjects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "usage: megapar bench SUBJECT" in shown and "bench kernels --help" in shown


def test_examples_are_understood() -> None:
    """An example in the help that is refused would be worse than none."""
    import shlex

    for name, command in commands().items():
        for line, _ in command.examples:
            words = shlex.split(line)
            call = understand(words[words.index(name.split()[0]) :])
            assert call.command is command
            if not call.multirun:
                compose(name, split(call.arguments))


def test_every_field_is_described() -> None:
    for kind in COMMANDS.values():
        for key, field in keys(kind).items():
            text = field.help
            assert text and "\n" not in text and len(text) < 120, key


HELP = "import sys; from megapar.cli import main; main(['--help']); main(['--version'])\n"


def test_help_is_light() -> None:
    """None of the heavy packages, and few modules at all."""
    heavy = "heavy = {'torch', 'hydra', 'omegaconf', 'numpy', 'yaml'} & set(sys.modules); assert not heavy, heavy\n"
    count = "print(len(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", HELP + heavy + count], check=True, capture_output=True, text=True)
    assert int(done.stderr) < 200


@pytest.mark.slow
def test_help_is_fast() -> None:
    seconds = []
    for _ in range(3):  # the fastest of three: the machine may be busy
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", HELP], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3


def test_help_of_a_command_needs_neither_torch_nor_hydra() -> None:
    code = "import sys; from megapar.cli import main; main(['train', '--help'])\n"
    code += "assert not {'torch', 'hydra', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_defaults_come_from_the_dataclasses() -> None:
    """conf/ says only what differs: without any group the composed config is the schema's."""
    config = compose("train", split(["model=tiny"]))
    assert config == TrainConfig()
    assert to_dict(config)["train"]["seq_length"] == 128


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("megapar 0.")


def test_broken_pipe_is_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        f"{sys.executable} -m megapar.cli train --info config | head -1", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


def test_a_table_is_for_its_own_number_of_ranks(tmp_path: Path) -> None:
    """Layouts of verify with other ranks run 1F1B, as a partition becomes uniform; `auto` keeps to the table."""
    path = tmp_path / "table.csv"
    write(build("zb_h1", 2, 12), str(path))
    schedule = f"pipeline.schedule=csv:{path}"
    config = resolve(compose("verify", split([schedule, "layouts=[pp2,tp2]"])))
    check(config)
    schedules = [with_layout(config, Layout.parse(name)).pipeline.schedule for name in ("pp2", "tp2", "pp4")]
    assert schedules == [f"csv:{path}", "1f1b", "1f1b"]
    with pytest.raises(ConfigError, match="the table has 2 rows; name a layout with pp2"):
        check(resolve(compose("verify", split([schedule, "layouts=[tp2,pp4]"]))))
    sizes = ["parallel=auto", "devices=4", "train.micro_batch_size=1", "train.global_batch_size=12"]
    with pytest.raises(ConfigError, match="devices=2 works"):  # dp 2 would leave 6 micro-batches
        resolve(compose("train", split([schedule, "model.heads=3", "model.hidden=96", "model.ffn=99", *sizes])))
    sizes[1] = "devices=2"
    assert resolve(compose("train", split([schedule, *sizes]))).parallel.pp == 2


def test_a_tables_path_holds_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(build("1f1b", 1, 4), str(tmp_path / "a=b, c.csv"))
    monkeypatch.chdir(tmp_path)
    config = resolve(compose("train", split(["pipeline.schedule=csv:a=b, c.csv"])))
    check(config)
    assert (config.pipeline.schedule, config.pipeline.chunks) == (f"csv:{tmp_path}/a=b, c.csv", 1)
    assert resolve(compose("train", split(["pipeline.costs=c.json"]))).pipeline.costs == f"{tmp_path}/c.json"
    swept = split(["pipeline.schedule=1f1b,zb_h1"])
    assert swept.hydra and not swept.verbatim  # names are swept, only a table's path is taken as it stands


def test_options_by_part_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line and from an experiment, and back from what a run keeps."""
    expected = {
        "embedding": PartOptions(lr_scale=0.1),
        "layers.[01]": PartOptions(lr_scale=0.5, weight_decay=0.0),
    }
    text = "{embedding: {lr_scale: 1e-1}, 'layers.[01]': {lr_scale: 0.5, weight_decay: 0}}"
    folder = tmp_path / "experiments" / "parts"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(f"optim:\n  name: muon\n  groups: {text}\n")
    monkeypatch.chdir(tmp_path)
    for words in ([f"optim.groups={text}"], ["experiment=parts"]):
        config = compose("train", split(words))
        assert list(config.optim.groups.items()) == list(expected.items())  # the first that matches counts
        resolved = resolve(config, vocab_size=1024)
        assert loads(TrainConfig, dump(resolved)) == resolved
        assert loads(TrainConfig, config_with_help(resolved)) == resolved
