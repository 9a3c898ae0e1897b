"""What is replayed: layouts that between them use every axis and option that decides who holds and sends what."""

from typing import Any

from megapar.config.schema import TrainConfig
from tests.tiny import GPT2, tiny_config

Values = dict[str, Any]

ZERO: Values = {"parallel.zero": 1}
SP: Values = {"parallel.sequence_parallel": True}
FP32: Values = {"train.dtype": "fp32"}
BF16: Values = {"train.dtype": "bf16"}
# 12 heads for layouts whose tp does not divide 4, as many key/value heads
TWELVE: Values = {"model.hidden": 24, "model.heads": 12, "model.kv_heads": 12, "model.ffn": 36}
LORA: Values = {"model.lora.rank": 3}
SHORT: Values = {"train.global_batch_size": 4, "train.micro_batch_size": 1}


def _schedule(name: str, layers: int, **more: Any) -> Values:
    return {"pipeline.schedule": name, "model.layers": layers, "train.micro_batch_size": 1} | more


# name -> (layout, values by dotted key)
LAYOUTS: dict[str, tuple[str, Values]] = {
    "single": ("single", {}),
    "tp2": ("tp2", {}),
    "pp2": ("pp2", {}),
    "dp2": ("dp2", FP32),
    "tp2pp2dp2": ("tp2pp2dp2", {}),
    "tp2pp2dp2_gpt2_zero_sp_dropout_bf16": ("tp2pp2dp2", GPT2 | ZERO | SP | BF16 | {"model.dropout": 0.1}),
    "tp4pp4dp4_zero": ("tp4pp4dp4", SHORT | ZERO | FP32 | {"model.layers": 4}),
    # tensor parallelism: replicas of the kv heads, uneven shards of the vocabulary, engines
    "tp4_sp_replicas": ("tp4", SP),
    "tp4_gpt2": ("tp4", GPT2 | FP32),
    # 510: ranks would cut at different parameters if each went by its own share of the vocabulary
    "tp3_uneven_vocabulary": ("tp3", TWELVE | SP | {"train.seq_length": 12, "parallel.bucket_size": 510}),
    "tp2_chunked": ("tp2", {"parallel.tp_overlap": "chunked"} | FP32),
    "tp2_sp_chunked_dropout": ("tp2", SP | {"parallel.tp_overlap": "chunked", "model.dropout": 0.1}),
    "tp2_recompute_full": ("tp2", SP | {"train.recompute": "full", "model.dropout": 0.1}),
    "tp2_recompute_selective": ("tp2", {"train.recompute": "selective"}),
    # data parallelism: ZeRO-1, buckets, compression
    "dp3_zero_uneven": ("dp3", ZERO | {"train.global_batch_size": 6, "model.hidden": 20, "model.head_dim": 4}),
    "tp2dp2_zero_bf16": ("tp2dp2", ZERO | BF16),
    "tp2dp2_small_buckets": ("tp2dp2", SP | {"parallel.bucket_size": 100}),
    "tp2dp2_one_bucket": ("tp2dp2", {"parallel.bucket_size": 1_000_000}),
    "dp2_bf16_gradients": ("dp2", FP32 | {"parallel.grad_compression": "bf16"}),
    "tp2dp2_int8_gradients": ("tp2dp2", FP32 | ZERO | {"parallel.grad_compression": "int8_ef"}),
    "pp2dp2_powersgd": ("pp2dp2", BF16 | {"parallel.grad_compression": "powersgd", "parallel.powersgd_rank": 2}),
    # pipelines: every schedule, partitions, tied ends
    "pp4_gpt2_tied": ("pp4", GPT2 | {"model.layers": 4}),
    "pp3_uneven_partition": ("pp3", {"model.layers": 5, "pipeline.partition": [1, 3, 1]}),
    "pp4_gpipe": ("pp4", _schedule("gpipe", 4)),
    "pp2dp2_interleaved": ("pp2dp2", _schedule("interleaved", 4)),
    "pp4_zb_h1": ("pp4", _schedule("zb_h1", 4)),
    "tp2pp2_zb_h1_tied_sp": ("tp2pp2", GPT2 | SP | _schedule("zb_h1", 2)),
    "pp4_zb_h2": ("pp4", _schedule("zb_h2", 4)),
    "pp2_zbv_tied": ("pp2", GPT2 | _schedule("zbv", 4)),
    "pp2dp2_dualpipe_v_zero": ("pp2dp2", ZERO | _schedule("dualpipe_v", 4)),
    "pp3_v_half": ("pp3", _schedule("v_half", 6)),
    "pp3_v_min": ("pp3", _schedule("v_min", 6)),
    "pp2_auto": ("pp2", _schedule("auto", 2)),
    # adapters beside frozen weights
    "tp2pp2_sp_lora": ("tp2pp2", SP | LORA),
    "tp4dp2_zero_lora_bf16": ("tp4dp2", ZERO | BF16 | LORA | {"model.lora.targets": ["q", "v", "down"]}),
    # not a step alone
    "tp2pp2_evaluation": ("tp2pp2", {"train.eval_every": 1, "train.eval_samples": 3}),
}


def config_of(name: str, prefix: str, **values: Any) -> TrainConfig:
    """The resolved config of a layout over the token files PREFIX; `values` by dotted key change it."""
    layout, own = LAYOUTS[name]
    return tiny_config(prefix, layout, **(own | values))
