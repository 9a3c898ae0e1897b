"""`megapar checkpoint`: lists, verifies, shows, compares and converts, whatever layout wrote it."""

import json
import os
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megapar.checkpoint import load, save
from megapar.checkpoint.export import Whole, to_dcp, to_safetensors
from megapar.cli import main
from megapar.launch.pool import WorkerPool
from megapar.train.trainer import Trainer
from tests.checkpoint import jobs
from tests.tiny import tiny_config

STEP = "step-00000002"
Run = dict[str, Path]


@pytest.fixture(scope="module")
def runs(pool: WorkerPool, tokens: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`tp2dp2`: checkpoints of two steps; `single` has the state of the second; in `changed` one weight is 0.5 more."""
    folder = tmp_path_factory.mktemp("runs")
    found = {name: folder / name for name in ("tp2dp2", "single", "changed")}
    for step in (1, 2):
        pool.run(jobs.run, 4, tiny_config(tokens, "tp2dp2", **{"parallel.zero": 1}), step, None, str(found["tp2dp2"]))
    config = tiny_config(tokens)
    trainer = Trainer(config, 0)
    load(found["tp2dp2"], trainer.optimizer, config)
    save(found["single"], trainer.optimizer, config, 2, tokens=128)
    trainer.optimizer.masters[0][3] += 0.5
    save(found["changed"], trainer.optimizer, config, 2, tokens=128)
    return found


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, list[str], str]:
    """(exit code, lines of standard output, standard error)"""
    capsys.readouterr()
    code = main(["checkpoint", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def test_ls_and_verify(runs: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs["tp2dp2"]
    code, lines, _ = said(capsys, "ls", folder)
    assert code == 0 and lines[0].split() == ["step", "size", "layout", "age", "files"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2"]
    assert all(" tp2dp2 " in line and line.endswith("  verified") for line in lines[1:])
    code, lines, _ = said(capsys, "verify", folder)
    assert code == 0 and [line.partition(": ")[0] for line in lines] == [
        str(folder / f"step-0000000{n}") for n in (1, 2)
    ]

    path = folder / STEP / "rank-00003.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    problem = f"{path}: changed, its SHA-256 is not the one in the manifest"
    code, lines, _ = said(capsys, "verify", folder)
    assert code == 1 and lines[1] == problem and lines[0].startswith(f"{folder}/step-00000001: verified")
    assert said(capsys, "verify", folder / STEP)[:2] == (1, [problem])
    assert said(capsys, "verify", folder / "step-00000001")[0] == 0
    code, lines, _ = said(capsys, "ls", folder)
    assert code == 0 and lines[2].endswith(problem)
    path.write_bytes(good)


def test_show(runs: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = said(capsys, "show", runs["single"], f"out={tmp_path}/facts.json")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert code == 0 and (facts["step"], facts["samples"], facts["tokens"]) == (2, 16, 128)
    assert facts["layout"] == "single" and len(facts["config_sha256"]) == 64
    assert facts["parameters"]["embedding.weight"] == [61, 16] and "  embedding.weight [61, 16]" in lines
    assert facts["versions"]["torch"] == torch.__version__
    assert said(capsys, "show", runs["tp2dp2"])[0] == 0  # which has no number of tokens


def test_diff(runs: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Across layouts: the same bits are the same, and one weight is found."""
    code, lines, _ = said(capsys, "diff", runs["tp2dp2"], runs["single"])
    assert code == 1 and "layout: tp2dp2 | single" in lines and "config: parallel.tp: 2 | 1" in lines
    assert not any("values, by" in line for line in lines)
    code, lines, _ = said(capsys, "diff", runs["tp2dp2"], runs["changed"], f"out={tmp_path}/diff.json")
    (line,) = [line for line in lines if "values, by" in line]
    assert line.startswith("weight of ") and line.endswith(": 1 values, by 0.5 at most")
    (found,) = [one for one in json.loads((tmp_path / "diff.json").read_text()) if one["count"]]
    assert found["count"] == 1 and found["largest"] == pytest.approx(0.5)
    assert said(capsys, "diff", runs["single"], runs["single"])[:2] == (0, ["the same, to the bit"])
    assert said(capsys, "diff", runs["tp2dp2"] / "step-00000001", runs["tp2dp2"])[0] == 1


def whole_state(folder: Path) -> dict[str, Tensor]:
    whole = Whole(folder / STEP, state=True)
    return {name: whole.read(name) for name in whole.entries}


@pytest.mark.parametrize("most", [1e-5, 5])
def test_convert_to_safetensors(runs: Run, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "weights"
    assert said(capsys, "convert", runs["tp2dp2"], f"out={target}", f"shard_gb={most}")[0] == 0
    files = sorted(target.glob("*.safetensors"))
    assert (len(files) == 1) == (most == 5) and (target / "model.safetensors.index.json").exists() == (most != 5)
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    expected = {
        name: tensor for name, tensor in whole_state(runs["single"]).items() if not name.endswith(("_avg", "_sq"))
    }
    assert found.keys() == expected.keys() and "embedding.weight" in found
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    code, _, err = said(capsys, "convert", runs["tp2dp2"], f"out={target}")
    assert code == 2 and err.startswith(f"out={target}: is there already")


def test_convert_to_dcp(runs: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Read by torch, as its users would."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import load as dcp_load

    target = tmp_path / "dcp"
    assert said(capsys, "convert", runs["tp2dp2"], f"out={target}", "to=dcp", "state=true")[0] == 0
    expected = whole_state(runs["single"])
    found = {name: torch.full_like(tensor, torch.nan) for name, tensor in expected.items()}
    dcp_load(found, storage_reader=FileSystemReader(target), no_dist=True)
    assert len(found) > 30 and all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_is_no_step_folder(runs: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file or a pipe of such a name is a line of the list."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(runs["single"] / STEP, folder / STEP)
    (folder / "step-00000098").write_text("no folder")
    os.mkfifo(folder / "step-00000099")
    code, out, _ = said(capsys, "ls", folder)
    assert code == 0 and len(out) == 4 and sum("can't be read (Not a directory)" in line for line in out) == 2, out
    assert said(capsys, "verify", folder)[0] == 1


@pytest.mark.parametrize("to", ["safetensors", "dcp"])
def test_no_more_than_a_parameter_at_a_time(
    to: str, runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the one that is being made."""
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most, plain = [0], Whole.read

    def read(self: Whole, name: str) -> Tensor:
        most[0] = max(most[0], len(alive))
        tensor = plain(self, name)
        alive.add(tensor)
        return tensor

    monkeypatch.setattr(Whole, "read", read)
    whole = Whole(runs["single"] / STEP)
    count = to_dcp(whole, tmp_path / "out") if to == "dcp" else to_safetensors(whole, tmp_path / "out", 1 << 40)
    assert count == (len(whole.entries) if to == "dcp" else 1) and most[0] <= 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["ls"], "path=null: says which; give path=FOLDER"),
        (["show", "nowhere"], "nowhere: no such folder; give a step folder"),
        (["diff", "a", "b", "c"], "c: `megapar checkpoint diff` takes 2 folders, and a and b were given before it"),
        (["diff", "a", "first=b"], "first=b: a before it is short for first=a; give one of them"),
        (["look"], "checkpoint look: say what to checkpoint: convert, diff, ls, show, verify"),
        (["convert", "nowhere", "to=torch"], "to=torch: "),
        (["ls", 300 * "x"], f"{300 * 'x'}/manifest.json: File name too long; use a shorter one"),
        (["show", "nowhere", "out=nowhere/x.json"], "out=nowhere/x.json: "),
    ],
)
def test_refusals(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(capsys, *words)
    assert code == 2 and err.startswith(line) and err.count("\n") == 1, err
