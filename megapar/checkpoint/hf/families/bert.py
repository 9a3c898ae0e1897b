"""BERT: an encoder with norms of sums, token types, and a head for masked tokens or for classes, or a pooler."""

from collections.abc import Mapping
from typing import Any

from megapar.checkpoint.hf.family import Family, Field, Keys, Stored, linear
from megapar.checkpoint.hf.fields import INIT, SIZES
from megapar.config.errors import UserError
from megapar.config.schema import ModelConfig

MASKED, ENCODER, CLASSIFIER = "BertForMaskedLM", "BertModel", "BertForSequenceClassification"
_embeddings, _layer, _ours = "{p}embeddings", "{p}encoder.layer.{}", "layers.{}"
_head = "cls.predictions"
_linears = {
    f"{_embeddings}.LayerNorm": "embedding_norm",
    **{f"{_layer}.attention.self.{one}": f"{_ours}.attention.{one[0]}" for one in ("query", "key", "value")},
    f"{_layer}.attention.output.dense": f"{_ours}.attention.out",
    f"{_layer}.attention.output.LayerNorm": f"{_ours}.norm1",
    f"{_layer}.intermediate.dense": f"{_ours}.mlp.up",
    f"{_layer}.output.dense": f"{_ours}.mlp.down",
    f"{_layer}.output.LayerNorm": f"{_ours}.norm2",
    "{p}pooler.dense": "pooler",
    "classifier": "classifier",
    f"{_head}.transform.dense": "head.dense",
    f"{_head}.transform.LayerNorm": "norm",
}


def _read(config: Mapping[str, Any], keys: Keys) -> Keys:
    architecture = (config.get("architectures") or [MASKED])[0]
    if architecture == CLASSIFIER:
        if (kind := config.get("problem_type")) not in (None, "single_label_classification"):
            raise UserError(f"problem_type={kind!r} is not supported; there is single_label_classification")
        classes = len(config["id2label"]) if "id2label" in config else config.get("num_labels", 2)
        return {"output": "classes", "classes": classes, "pooler": True, "tied": False}
    if architecture == ENCODER:
        return {"output": "hidden", "pooler": config.get("add_pooling_layer", True), "tied": False}
    if not keys["tied"]:  # their logits then have a bias of another name
        raise UserError("tie_word_embeddings=False is not supported with a head for masked tokens; there is True")
    return {"output": "mlm", "output_bias": True}


def _write(model: ModelConfig) -> Keys:
    if model.output == "hidden":
        more = {} if model.pooler else {"add_pooling_layer": False}
        return {"architectures": [ENCODER], "tie_word_embeddings": True} | more
    if model.output == "classes":
        names = {str(number): f"LABEL_{number}" for number in range(model.classes or 0)}
        numbers = {name: int(number) for number, name in names.items()}
        about = {"id2label": names, "label2id": numbers}
        return {"architectures": [CLASSIFIER], "tie_word_embeddings": True} | about
    return {"architectures": [MASKED]}


FAMILIES = (
    Family(
        "bert",
        MASKED,
        (
            Stored(f"{_embeddings}.word_embeddings.weight", ("embedding.weight",)),
            Stored(f"{_embeddings}.position_embeddings.weight", ("positions.weight",)),
            Stored(f"{_embeddings}.token_type_embeddings.weight", ("token_types.weight",)),
            *(one for disk, name in _linears.items() for one in linear(disk, name)),
            Stored(f"{_head}.bias", ("head.bias",)),
            Stored(f"{_head}.decoder.weight", ("head.weight",)),
        ),
        (
            *SIZES,
            INIT,
            Field("layer_norm_eps", "norm_eps", 1e-12),
            Field("type_vocab_size", "token_types", 2),
            Field("tie_word_embeddings", "tied", True),
            Field("hidden_act", "activation", "gelu", {"gelu_erf": "gelu", "gelu": ("gelu_new", "gelu_pytorch_tanh")}),
        ),
        fixed={
            "norm": "layernorm",
            "norm_order": "post",
            "position": "learned",
            "bias": True,
            "causal": False,
            "embedding_norm": True,
        },
        must={"is_decoder": False, "add_cross_attention": False, "position_embedding_type": ("absolute", None)},
        read=_read,
        write=_write,
        default_length=512,
        others=(ENCODER, CLASSIFIER, "BertForPreTraining"),
        prefixes=("bert.", ""),
        ignored=(
            r"(bert\.)?embeddings\.position_ids",
            r"bert\.pooler\..*",  # beside a head for masked tokens, which does not read it
            r"cls\.predictions\.decoder\.bias",
            r"cls\.seq_relationship\..*",
        ),
        renamed=((r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias")),
    ),
)
