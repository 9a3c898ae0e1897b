"""A user imports a model, writes with it, trains on in a layout, exports, and transformers loads that."""

import json
from pathlib import Path

import pytest
import torch

import megapar
from megapar.cli import main
from tests.checkpoint.hf.models import build, save
from tests.data import hf
from tests.data.texts import make_text
from tests.tiny import write_tokens


@pytest.mark.more
def test_from_import_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers

    source = save(build("gemma3_linear", vocab_size=410), hf.gpt2_like(tmp_path / "source"))
    (tmp_path / "text").mkdir()
    for seed in range(12):
        (tmp_path / "text" / f"{seed}.txt").write_text(make_text(seed), encoding="utf-8")
    imported, tuned, exported = (str(tmp_path / name) for name in ("imported", "tuned", "exported"))
    assert main(["import", str(source), f"run.dir={imported}"]) == 0
    capsys.readouterr()
    written = tmp_path / "written"
    assert main(["generate", imported, "prompt=alpha", "sample.max_tokens=3", "parallel=tp2", f"out={written}"]) == 0
    assert written.read_text().startswith("alpha")
    line = ["train", f"model={imported}", f"checkpoint.weights={imported}", f"run.dir={tuned}", "parallel=tp2pp2"]
    line += [f"data.path={tmp_path / 'text'}", f"data.cache={tmp_path / 'cache'}", "data.document_mask=true"]
    line += ["train.seq_length=16", "train.steps=2", "train.micro_batch_size=1", "train.global_batch_size=2"]
    assert main([*line, "logger=disabled"]) == 0
    assert f"data: the tokenizer of the weights, {imported}/hf/tokenizer.json" in capsys.readouterr().err
    assert main([*line, "logger=disabled"]) == 0
    assert "is finished" in capsys.readouterr().err
    whole = [word.replace("checkpoint.weights", "checkpoint.load").replace(tuned, f"{tuned}2") for word in line]
    assert main([*whole, f"data.tokenizer={imported}/hf"]) == 2
    assert "holds weights alone, and no optimizer's state; use checkpoint.weights" in capsys.readouterr().err
    assert main(["export", tuned, f"hf={exported}"]) == 0
    kept = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    assert all((Path(exported) / name).read_bytes() == (source / name).read_bytes() for name in kept)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, attn_implementation="eager").eval()
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected, before = model(ids).logits, megapar.from_hf(source).eval()(ids)
        found = megapar.from_hf(exported).eval()(ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (found - before).abs().max() > 1e-4
    manifest = json.loads(next(Path(tuned).glob("checkpoints/step-*/manifest.json")).read_text())
    assert manifest["config"]["data"]["tokenizer"] == f"{imported}/hf/tokenizer.json"


def test_a_sweep_over_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what import says to go on with names the length of a table of positions."""
    one, two = (save(build(name, vocab_size=61), tmp_path / name) for name in ("llama", "gpt2"))
    line = ["train", "-m", f"model={one},{two}", f"data.path={write_tokens(tmp_path)}", "logger=disabled"]
    line += ["train.steps=1", "train.seq_length=16", "train.micro_batch_size=1", "train.global_batch_size=1"]
    line += [f"run.dir={tmp_path / 'sweep'}"]
    assert main(line) == 0
    rows = [json.loads(row) for row in (tmp_path / "sweep" / "ledger.jsonl").read_text().splitlines()]
    done = [row["overrides"] for row in rows if row["state"] == "done"]
    assert [texts[0] for texts in done] == [f"model={one}", f"model={two}"]
    assert main(line) == 0
    assert "2 of 2 points are done" in capsys.readouterr().err
    assert main(["import", str(two), f"run.dir={tmp_path / 'run'}"]) == 0
    assert "data.path=TEXT train.seq_length=64" in capsys.readouterr().out
