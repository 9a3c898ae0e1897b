"""A model that every layout of the tests divides, and one comparison of a layout with the one-process run."""

from pathlib import Path
from typing import Any

from megapar.config.derive import resolve
from megapar.config.keys import changed
from megapar.config.layout import Layout
from megapar.config.schema import VerifyConfig
from megapar.launch.pool import WorkerPool
from megapar.verify import Verdict, compare_layouts
from tests.tiny import GPT2, VOCABULARY

# 12 heads and 4 layers: divisible by 1 to 4; 12 samples of 12 tokens likewise; the vocabulary (61) by none of them.
SMALL: dict[str, Any] = {
    "model.layers": 4,
    "model.hidden": 24,
    "model.heads": 12,
    "model.ffn": 36,
    "model.vocab_size": VOCABULARY,
    "optim.lr": 1e-3,
    "optim.clip_grad": 0.5,
    "parallel.bucket_size": 3000,
    "parallel.check_gradients": True,
    "train.steps": 2,
    "train.seq_length": 12,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 12,
    "train.dtype": "fp64",
}
STYLES: dict[str, dict[str, Any]] = {"llama": {}, "gpt2": {k: v for k, v in GPT2.items() if k != "model.heads"}}


def verify_config(prefix: str, layouts: list[str], **values: Any) -> VerifyConfig:
    data = {"data.path": prefix, "data.prefix": prefix, "layouts": layouts}
    return resolve(changed(VerifyConfig(), SMALL | data | values))


def compare(pool: WorkerPool, folder: Path, config: VerifyConfig) -> list[Verdict]:
    return list(compare_layouts(config, pool, str(folder)))


# Every tp, pp, dp of up to 8 ranks that 24 heads, 8 layers and 24 samples divide (5 and 7 don't).
EIGHT = {"model.layers": 8, "model.hidden": 48, "model.heads": 24, "model.ffn": 48, "train.global_batch_size": 24}
ALL_OF_EIGHT = [
    str(Layout(tp=tp, pp=pp, dp=dp))
    for tp in (1, 2, 3, 4, 6, 8)
    for pp in range(1, 9)
    for dp in (1, 2, 3, 4, 6, 8)
    if 1 < tp * pp * dp <= 8
]
ALL = [
    str(Layout(tp=tp, pp=pp, dp=dp))
    for tp in range(1, 5)
    for pp in range(1, 5)
    for dp in range(1, 5)
    if 1 < tp * pp * dp <= 8
]
