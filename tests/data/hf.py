"""Tokenizers of Hugging Face's kinds, made here: a folder with `tokenizer.json` and what belongs beside it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megapar.data.tokenizer.contract import SPACE_MARK
from tests.data.texts import make_text

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|header|>"]
TOOL = "<tool>"  # an added token that is text
CHATML = """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|header|>' + message['role'] + '<|header|>\\n\\n'+ message['content'] | trim + '<|im_end|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|header|>assistant<|header|>\\n\\n' }}{% endif %}"
)


def write(folder: Path, spec: dict[str, Any], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def edit(folder: Path, name: str = "tokenizer.json", **changes: Any) -> None:
    """Change top-level entries of one of a folder's files."""
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def trained(tokenizer: Tokenizer, kind: Any, special: list[str], **options: Any) -> dict[str, Any]:
    trainer = kind(special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator([make_text(seed) for seed in range(10)], trainer)
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    return spec


def gpt2_like(folder: Path, **config: Any) -> Path:
    """Byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    spec = trained(tokenizer, trainers.BpeTrainer, CONTROLS, vocab_size=400, initial_alphabet=alphabet)
    tokenizer.add_tokens([TOOL])
    spec["added_tokens"] = json.loads(tokenizer.to_str())["added_tokens"]
    return write(folder, spec, {"bos_token": "<s>", "eos_token": "</s>", **config})


def llama_like(folder: Path, *, prepend: bool = False, **config: Any) -> Path:
    """BPE with byte fallback and a mark for a space, in front of the text too with `prepend`."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    marks = normalizers.Replace(" ", SPACE_MARK)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE_MARK), marks]) if prepend else marks
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    spec = trained(tokenizer, trainers.BpeTrainer, ["<unk>", *CONTROLS, *BYTES], vocab_size=420)
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "special": True}
    named = {"bos_token": "<s>", "eos_token": end, "unk_token": "<unk>"}
    return write(folder, spec, {**named, **config})


def unigram_like(folder: Path, **config: Any) -> Path:
    """Unigram with byte fallback, whose vocabulary holds the control tokens as pieces, as T5's does."""
    words = ["alpha", f"{SPACE_MARK}beta", SPACE_MARK, *"abcdehlpt<>/|_s", "\n"]
    pieces = [("<unk>", 0.0), *((piece, 0.0) for piece in CONTROLS), *((piece, -9.0) for piece in BYTES)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((word, -5.0) for word in words)], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, "never")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(SPACE_MARK, "never")])
    tokenizer.add_special_tokens(["<unk>", *CONTROLS])
    spec = json.loads(tokenizer.to_str())
    return write(folder, spec, {"eos_token": "</s>", "pad_token": "<s>", **config})


def bert_like(folder: Path, **config: Any) -> Path:
    """WordPiece of lower-cased words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained(tokenizer, trainers.WordPieceTrainer, special, vocab_size=200)
    around = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    spec = json.loads(tokenizer.to_str())
    return write(folder, spec, {"sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]", **config})


def word_like(folder: Path, **config: Any) -> Path:
    """A handful of words: fewer tokens than the tiny model has."""
    vocabulary = {"[UNK]": 0, "</s>": 1, "alpha": 2, "beta": 3, "{": 4, "a": 5, "}": 6, ",": 7, "b": 8}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken("</s>")])
    return write(folder, json.loads(tokenizer.to_str()), {"eos_token": "</s>", **config})
