"""Adapters trained here: merged on export as transformers computes, and by themselves as PEFT loads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megapar.checkpoint import save
from megapar.cli import main
from megapar.config.errors import UserError
from megapar.config.file import dump, load_config
from megapar.config.keys import changed
from megapar.convert import import_folder
from megapar.train.trainer import Trainer
from tests.checkpoint.hf.models import build
from tests.checkpoint.hf.models import save as save_hf
from tests.checkpoint.hf.test_round_trip import export, load, quiet, tensors
from tests.tiny import tiny_config

LORA: dict[str, Any] = {"model.lora.rank": 3, "model.lora.alpha": 5.0}


def tuned(name: str, folder: Path, tokens: str, base: str, **values: Any) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A run with adapters on a model of transformers', its ids and its logits [B, S, V]."""
    source = save_hf(build(name), folder / "source")
    import_folder(source, folder / "imported", quiet)
    keys = {"model": load_config(folder / "imported").model, "train.seq_length": 16, "train.dtype": "fp32"}
    plain = changed(tiny_config(tokens), keys)
    config = changed(plain, LORA | {"model.lora.base": str(folder / base), "run.dir": str(folder / "run")} | values)
    trainer = Trainer(config, 0)
    for step in range(1, 4):
        trainer.step(step)
    save(folder / "run" / "checkpoints", trainer.optimizer, config, 3)
    (folder / "run" / "config.yaml").write_text(dump(config))
    ids = torch.arange(32).view(2, 16)
    [stage] = trainer.stages.values()
    stage.train(False)
    with torch.no_grad():
        found = stage({}, {"ids": ids, "samples": torch.arange(2), "step": torch.tensor(0)})["logits"]
    trainer.close()
    return folder / "run", ids, found.view(2, 16, -1)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("llama", "imported"),
        pytest.param("qwen3", "source", marks=pytest.mark.slow),
        pytest.param("gpt2", "imported", marks=pytest.mark.slow),
    ],
)
def test_merged(name: str, base: str, tmp_path: Path, tokens: str) -> None:
    """fp32: 1e-5 of the largest logit, as for every family."""
    run, ids, expected = tuned(name, tmp_path, tokens, base, **({"train.seq_length": 64} if name == "gpt2" else {}))
    export(run, tmp_path / "merged")
    with torch.no_grad():
        found = load(name, tmp_path / "merged")(ids)["logits"]
        plain = load(name, tmp_path / "source")(ids)["logits"]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-3 * expected.abs().max()


def test_peft_loads_them(tmp_path: Path, tokens: str) -> None:
    import peft

    run, ids, expected = tuned("llama", tmp_path, tokens, "source", **{"model.lora.targets": ["q", "v", "out", "down"]})
    export(run, tmp_path / "adapters", adapters=True)
    about = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert about["target_modules"] == ["mlp.down_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
    assert about["base_model_name_or_path"] == str(tmp_path / "source")
    export(run, tmp_path / "halves", adapters=True, dtype="bf16")
    assert {tensor.dtype for tensor in tensors(tmp_path / "halves").values()} == {torch.bfloat16}
    model = peft.PeftModel.from_pretrained(load("llama", tmp_path / "source"), str(tmp_path / "adapters"))
    with torch.no_grad():
        found = model(ids)["logits"]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_base_that_has_moved(tmp_path: Path, tokens: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands say where they looked, and take it from where it is now; another one is refused."""
    run, _, _ = tuned("llama", tmp_path, tokens, "imported")
    export(run, tmp_path / "before")
    imported, moved = tmp_path / "imported", tmp_path / "moved"
    imported.rename(moved)
    asked = ["export", str(run), f"hf={tmp_path / 'after'}"]
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert said == f"model.lora.base={imported}: no such folder; if it has moved, give checkpoint.base=FOLDER\n"
    assert main([*asked, f"checkpoint.base={run}"]) == 2
    assert "has adapters of other weights" in capsys.readouterr().err
    assert main([*asked, f"checkpoint.base={moved}"]) == 0
    capsys.readouterr()
    before, after = tensors(tmp_path / "before"), tensors(tmp_path / "after")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert main(["export", str(moved), f"hf={tmp_path / 'plain'}", f"checkpoint.base={moved}"]) == 2
    assert capsys.readouterr().err.startswith(f"checkpoint.base={moved}: the run has no adapters")


def test_refusals(tmp_path: Path, tokens: str) -> None:
    run, _, _ = tuned("gpt2", tmp_path, tokens, "imported", **{"train.seq_length": 64})
    with pytest.raises(UserError, match=r"^gpt2: .*c_attn.weight is one tensor with one adapter there"):
        export(run, tmp_path / "adapters", adapters=True)
    with pytest.raises(UserError, match=r"^adapters=true: .*has none \(model.lora.rank=0\); leave it out"):
        export(tmp_path / "imported", tmp_path / "adapters", adapters=True)
    assert not (tmp_path / "adapters").exists()
    config = load_config(run)
    (run / "config.yaml").write_text(dump(changed(config, {"model.lora.base": None})))
    with pytest.raises(UserError, match=r"^model.lora.base=null: .*has adapters of other weights"):
        export(run, tmp_path / "merged")
