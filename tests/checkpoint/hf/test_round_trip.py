"""`megapar import` and `megapar export`: bitwise round trips, and transformers loads what we write."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import megapar
from megapar.checkpoint.hf.family import families, in_full, to_model
from megapar.checkpoint.hf.folder import model_keys
from megapar.config.errors import UserError
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.run_schema import ExportConfig
from megapar.config.schema import ModelConfig, TrainRunConfig
from megapar.convert import export_run, import_folder
from megapar.launch.pool import WorkerPool
from megapar.library.settings import settings
from megapar.train.loop import Loop
from tests.checkpoint.hf.models import MODELS, build, distance, reference, save, theirs
from tests.tiny import tiny_config


def quiet(line: str) -> None:
    pass


def export(run: Path, target: Path, **values: Any) -> Path:
    export_run(changed(ExportConfig(run=TrainRunConfig(dir=str(run)), hf=str(target)), values), quiet)
    return target


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def load(name: str, folder: Path) -> Any:
    import transformers

    model = getattr(transformers, MODELS[name][0]).from_pretrained(folder, attn_implementation="eager")
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    source = save(build(name), tmp_path / "source")
    import_folder(source, tmp_path / "run", quiet)
    back = export(tmp_path / "run", tmp_path / "back", shard_gb=4e-5)
    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys() and all(torch.equal(before[one], after[one]) for one in before)
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert len(list(back.glob("*.safetensors"))) > 3
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in after.values())
    ref = reference(name)
    with torch.no_grad():
        outputs = theirs(load(name, back), ref.ids, ref.masks["left"], ref.types, ref.source)
    assert distance(outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"], ref, "left") == 0.0


def test_halves_stay_halves(tmp_path: Path) -> None:
    source = save(build("qwen3", torch.bfloat16), tmp_path / "source")
    import_folder(source, tmp_path / "run", quiet)
    back = export(tmp_path / "run", tmp_path / "back")
    before, after = tensors(source), tensors(back)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert all(torch.equal(before[one], after[one]) for one in before)
    wide = export(tmp_path / "run", tmp_path / "wide", dtype="fp32")
    assert json.loads((wide / "config.json").read_text())["dtype"] == "float32"
    assert all(torch.equal(before[one].float(), tensor) for one, tensor in tensors(wide).items())


@pytest.mark.parametrize("name", MODELS)
def test_config_of_a_model_of_our_own(name: str, tmp_path: Path) -> None:
    """What a family writes for a model is read again as that model, by us and by transformers."""
    source = save(build(name), tmp_path)
    keys, length = model_keys(source)
    model = settings(to_model(keys), {}, layout="single", dtype="fp32", device="cpu", seq_length=length, seed=None,
                     schedule="1f1b", chunks=None).model  # fmt: skip
    family = families()[json.loads((source / "config.json").read_text())["model_type"]]
    written = family.disk_config(model, length)
    assert in_full(to_model(family.model_keys(written))) == in_full(model)
    (source / "config.json").write_text(json.dumps(written))
    ref = reference(name)
    with torch.no_grad():
        outputs = theirs(load(name, source), ref.ids, ref.masks["right"], ref.types, ref.source)
    found = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    assert distance(found, ref, "right") == 0.0


PRESETS = {
    "llama": ("llama2_7b", "llama3_8b", "llama3_70b", "llama3_1_8b", "llama3_2_1b", "llama_small", "demo"),
    "mistral": ("mistral_7b",),
    "qwen2": ("qwen2_0_5b", "qwen2_7b"),
    "qwen3": ("qwen3_0_6b", "qwen3_8b"),
    "gemma": ("gemma_2b",),
    "gemma2": ("gemma2_2b", "gemma2_9b"),
    "gemma3_text": ("gemma3_1b",),
    "gpt2": ("gpt2", "gpt2_xl", "gpt2_small"),
    "olmo2": ("olmo2_7b",),
    "phi3": ("phi3_mini",),
    "bert": ("bert_base", "bert_large"),
    "t5": ("t5_small", "t5_base", "t5_v1_1_small"),
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in PRESETS.items() for name in names])
def test_presets_are_of_their_family(kind: str, name: str) -> None:
    """And what their config.json is read as is the preset, key for key."""
    options: dict[str, Any] = {"layout": "single", "dtype": "fp32", "device": "cpu", "seq_length": 512, "seed": None}
    options |= {"schedule": "1f1b", "chunks": None}
    model = settings(name, {}, **options).model
    family = families()[kind]
    again = to_model(family.model_keys(family.disk_config(model, 512)))
    assert settings(again, {}, **options).model == model


def test_a_model_of_no_family(tmp_path: Path) -> None:
    assert not {"made"} & families().keys()
    model = changed(ModelConfig(kv_heads=4, head_dim=32, ffn=384, vocab_size=100), {"logit_softcap": 3.0})
    with pytest.raises(UserError, match=r"^no llama has model.logit_softcap=3.0$"):
        families()["llama"].disk_config(model, 128)


@pytest.mark.parametrize("layout", ["single", "tp2pp2"])
def test_trained_on_and_exported(layout: str, tokens: str, tmp_path: Path, pool: WorkerPool) -> None:
    """From the folder, and from the imported run: the same weights after two steps, and transformers loads them."""
    source = save(build("gemma3", vocab_size=61), tmp_path / "source")
    import_folder(source, tmp_path / "imported", quiet)
    exported = []
    for number, weights in enumerate((source, tmp_path / "imported")):
        run = tmp_path / f"run{number}"
        values = {f"model.{key}": value for key, value in vars(to_model(model_keys(source)[0])).items()}
        values |= {"train.steps": 2, "run.dir": str(run), "logger.wandb.mode": "disabled"}
        values |= {"checkpoint.weights": str(weights)}
        values |= {f"parallel.{axis}": size for axis, size in Layout.parse(layout).items()}
        config = tiny_config(tokens, **values)
        run.mkdir()
        from megapar.config.file import dump

        (run / "config.yaml").write_text(dump(config))
        pool.run(train, Layout.parse(layout).world, config)
        exported.append(tensors(export(run, tmp_path / f"out{number}")))
    before = tensors(source)
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in before)
    assert not torch.equal(before["model.norm.weight"], exported[0]["model.norm.weight"])
    ids = torch.arange(12).view(1, 12)
    with torch.no_grad():
        expected = load("gemma3", tmp_path / "out0")(ids).logits
        found = megapar.from_hf(tmp_path / "out0").eval()(ids)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def train(rank: int, world_size: int, config: Any) -> None:
    Loop(config, rank).run()


BOUNDED = """
import sys, threading
from pathlib import Path
import torch
from megapar.convert import export_run, import_folder
from megapar.config.run_schema import ExportConfig
from megapar.config.schema import TrainRunConfig

def held():  # bytes that are in no file, as mapped ones are
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

def both(root):
    import_folder(root / "source", root / "run", print)
    export_run(ExportConfig(run=TrainRunConfig(dir=str(root / "run")), hf=str(root / "back")), print)

both(Path(sys.argv[1]))  # what is imported on the way
before, most, done = held(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        most[0] = max(most[0], held())
threading.Thread(target=watch).start()
both(Path(sys.argv[2]))
done.set()
print(most[0] - before)
"""


def test_memory_is_that_of_the_largest_parameter(tmp_path: Path) -> None:
    """Of 150 MB with a largest parameter of 25 MB: that, and the 4 MB that are read at a time."""
    sizes: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
    }
    model = build("llama", **sizes, num_key_value_heads=8, vocab_size=12000)
    save(model, tmp_path / "large" / "source", "200MB")
    save(build("llama"), tmp_path / "small" / "source")
    total = sum(parameter.numel() for parameter in model.parameters()) * 4
    largest = max(parameter.numel() for parameter in model.parameters()) * 4
    assert total > 5 * largest
    command = [sys.executable, "-c", BOUNDED, str(tmp_path / "small"), str(tmp_path / "large")]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back at once
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    most = int(done.stdout.split()[-1])
    assert largest <= most <= 1.5 * largest, (most, largest)
