"""Folders that can't be read are one line, by import, by `checkpoint.weights` and from Python; nothing is written."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import megapar
from megapar.checkpoint.hf.family import families, to_model
from megapar.checkpoint.hf.folder import model_keys, open_weights
from megapar.config.errors import UserError
from megapar.convert import import_folder
from megapar.library.settings import settings
from tests.checkpoint.hf.models import build, save


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("saved")
    return {name: save(build(name), root / name, "1GB") for name in ("llama", "phi3", "gpt2", "bert_masked", "gemma3")}


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config[name]
        (folder / "config.json").write_text(json.dumps(config))

    return change


def with_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def broken(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def index(weight_map: Any) -> Callable[[Path], None]:
    return broken("model.safetensors.index.json", json.dumps({"weight_map": weight_map}).encode())


NORM = "model.layers.1.input_layernorm.weight"
QKV = "model.layers.0.self_attn.qkv_proj.weight"
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "missing": ("llama", with_tensors(lambda t: t.pop(NORM)), f"has no tensor {NORM}, which a llama of this"),
    "whole numbers": ("llama", with_tensors(lambda t: t.update({NORM: t[NORM].to(torch.int8)})), f"{NORM} is I8, and"),
    "one too many": (
        "llama",
        with_tensors(lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)})),
        "has a tensor model.layers.0.extra.weight, and a llama",
    ),
    "a layer too many": ("llama", with_config(num_hidden_layers=2), "has a tensor model.layers.2."),
    "another shape": (
        "llama",
        with_tensors(lambda t: t.update({NORM: torch.ones(47)})),
        rf"tensor {NORM} has shape \[47\], and a llama of this config.json \[48\]",
    ),
    "another shape of a joint tensor": (
        "phi3",
        with_tensors(lambda t: t.update({QKV: t[QKV][:-1].clone()})),
        rf"tensor {QKV} has shape \[79, 48\], and a phi3 of this config.json \[80, 48\]",
    ),
    "transposed": (
        "gpt2",
        with_tensors(lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(100, 48)})),
        r"h.0.mlp.c_fc.weight has shape \[100, 48\], and a gpt2 of this config.json \[48, 100\]",
    ),
    "unknown": ("llama", with_config(model_type="lama"), "model_type='lama' is not known; there are .*llama"),
    "no type": ("llama", with_config(model_type=None), "model_type=None is not known"),
    "another head": (
        "llama",
        with_config(architectures=["LlamaForSequenceClassification"]),
        "architectures=LlamaForSequenceClassification is not supported; of llama there are LlamaForCausalLM",
    ),
    "remote code": ("llama", with_config(auto_map={"AutoModel": "x.py"}), "auto_map names code .* never run"),
    "pickled": ("llama", pickled, "pytorch_model.bin: pickled weights are never loaded; convert them: python -c"),
    "no weights": ("llama", lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors"),
    "broken file": ("llama", broken("model.safetensors", b"1234"), "model.safetensors: can't be read .* again"),
    "broken config": ("llama", broken("config.json", b"{"), "config.json: can't be read as JSON"),
    "a list": ("llama", broken("config.json", b"[]"), "config.json: is no JSON object"),
    "sizes are texts": ("llama", with_config(hidden_size="many"), "config.json|hidden"),
    "a file elsewhere": ("llama", index({"a": "../model.safetensors"}), "is no name of a file in the folder"),
    "broken index": ("llama", index(3), "model.safetensors.index.json: can't be read"),
    "activation": ("llama", with_config(hidden_act="relu"), "hidden_act='relu' is not supported; there are 'silu'"),
    "positions": (
        "llama",
        with_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1.0, "factor": 2.0}),
        "rope_type='yarn' is not supported; there are default, linear, dynamic, llama3",
    ),
    "partial": ("phi3", with_config(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor=0.5"),
    "a size that is not there": ("bert_masked", without("num_attention_heads"), "has no num_attention_heads; add it"),
    "too few kinds of layers": (
        "gemma3",
        with_config(layer_types=["sliding_attention"]),
        "layer_types has 1 kinds for 7 layers",
    ),
    "no kinds of layers": ("gemma3", with_config(layer_types=[]), "layer_types has 0 kinds for 7 layers"),
    "a softcap without effect": (
        "gemma3",
        with_config(attn_logit_softcapping=5.0),
        "attn_logit_softcapping=5.0 is not",
    ),
    "untied masked head": ("bert_masked", with_config(tie_word_embeddings=False), "tie_word_embeddings=False is not"),
    "quantized": ("llama", with_config(quantization_config={"quant_method": "gptq"}), "quantized weights are not read"),
    "architectures is a number": ("llama", with_config(architectures=5), "architectures=5 is not supported"),
    "type is a list": ("llama", with_config(model_type=["llama"]), "model_type=.* is not known"),
    "positions are a text": ("llama", with_config(max_position_embeddings="many"), "is it one of llama?"),
    "scaled by layers": ("gpt2", with_config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx"),
    "a decoder": ("bert_masked", with_config(is_decoder=True), "is_decoder=True is not supported"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_by_name(case: str, saved: dict[str, Path], tmp_path: Path) -> None:
    name, change, words = CASES[case]
    folder = shutil.copytree(saved[name], tmp_path / "folder")
    change(folder)
    for use in (lambda: import_folder(folder, tmp_path / "run", print), lambda: megapar.from_hf(folder)):
        with pytest.raises(UserError, match=words) as refused:
            use()
        assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_what_is_left_out(saved: dict[str, Path], tmp_path: Path) -> None:
    """Masks among the tensors, names of older files, copies of tied weights, and the class's other head."""
    folder = shutil.copytree(saved["gpt2"], tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    older |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file(older, folder / "model.safetensors")
    ids = torch.arange(6).view(1, 6)
    with torch.no_grad():
        assert torch.equal(megapar.from_hf(folder).eval()(ids), megapar.from_hf(saved["gpt2"]).eval()(ids))

    folder = shutil.copytree(saved["bert_masked"], tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    older = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
             for name, tensor in tensors.items()}  # fmt: skip
    older |= {"bert.pooler.dense.weight": torch.ones(48, 48), "bert.pooler.dense.bias": torch.ones(48)}
    older |= {"cls.seq_relationship.weight": torch.ones(2, 48), "bert.embeddings.position_ids": torch.arange(64)}
    older |= {"cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone()}
    save_file(older, folder / "model.safetensors")
    with_config(architectures=["BertForPreTraining"])(folder)
    with torch.no_grad():
        assert torch.equal(megapar.from_hf(folder).eval()(ids), megapar.from_hf(saved["bert_masked"]).eval()(ids))


def test_masks(saved: dict[str, Path]) -> None:
    model, ids = megapar.from_hf(saved["llama"]), torch.arange(8).view(2, 4)
    with pytest.raises(ValueError, match=r"^attention_mask: has holes"):
        model(ids, attention_mask=torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"^attention_mask: \[1, 4\], and ids are \[2, 4\]"):
        model(ids, attention_mask=torch.ones(1, 4))


def test_nothing_half_is_left(saved: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an import that is interrupted or finds a full disk, so that the same command can be given again."""
    (tmp_path / "empty").mkdir()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, run_dir in (
        (KeyboardInterrupt(), tmp_path / "run"),
        (full, tmp_path / "run"),
        (full, tmp_path / "empty"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("megapar.convert.dump", Mock(side_effect=error))  # behind everything but the last rename
            with pytest.raises((KeyboardInterrupt, UserError)) as raised:
                import_folder(saved["llama"], run_dir, print)
        assert error is not full or "No space left on device" in str(raised.value)
        assert [path.name for path in tmp_path.rglob("*")] == ["empty"]
    import_folder(saved["llama"], tmp_path / "empty", print)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run.dir=.*file: is a file$"):
        import_folder(saved["llama"], tmp_path / "file", print)


@pytest.mark.parametrize(("kind", "size"), [("mistral", 8), ("qwen2", 32), ("qwen3", 32)])
def test_what_a_class_takes_for_granted(kind: str, size: int) -> None:
    """Keys that config.json may leave out, by the defaults of transformers' classes."""
    import transformers

    config = transformers.AutoConfig.for_model(kind).to_dict()
    keys = families()[kind].model_keys(
        {k: v for k, v in config.items() if k not in ("num_key_value_heads", "head_dim")}
    )
    assert keys["kv_heads"] == size == config["num_key_value_heads"]
    assert keys["head_dim"] == (128 if kind == "qwen3" else None)


def test_learned_positions_name_the_length(saved: dict[str, Path]) -> None:
    keys, _ = model_keys(saved["gpt2"])
    choices: Any = {"layout": "single", "dtype": "fp32", "device": "cpu", "seed": None, "schedule": "1f1b"}
    config = settings(to_model(keys), {}, **choices, seq_length=16, chunks=None)
    with pytest.raises(UserError, match=r"^train.seq_length=16: .* 64 learned positions; use train.seq_length=64$"):
        open_weights(saved["gpt2"], config)


LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
OLDER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rope_scaling comes first": (
        {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 4}},
        {"kind": "linear", "factor": 4.0},
    ),
    "original length beside": (
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 16},
        {"kind": "llama3", "factor": 8.0, "original_length": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "original length left out": (
        {"rope_scaling": LLAMA3, "max_position_embeddings": 64},
        {"kind": "llama3", "factor": 8.0, "original_length": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}


@pytest.mark.parametrize("case", OLDER)
def test_older_spellings_of_rope(case: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """As transformers reads them, which the frequencies of its module show."""
    import transformers

    changes, expected = OLDER[case]
    folder = shutil.copytree(saved["llama"], tmp_path / "folder")
    with_config(**changes)(folder)
    assert model_keys(folder)[0]["rope_scaling"] == expected
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.arange(40).view(1, 40)
    with torch.no_grad():
        logits, found = model(ids).logits, megapar.from_hf(folder).eval()(ids)
    assert (found - logits).abs().max() < 1e-5 * logits.abs().max()
