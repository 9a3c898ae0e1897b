"""Sizes of models, for which kernels are compiled without a GPU and benchmarked."""

from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Sizes:
    """Of one layer of a model, and the dtype that it trains in."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def describe(self, name: str) -> str:
        return (
            f"{name}: hidden {self.hidden}, {self.heads} heads and {self.kv_heads} kv heads of {self.head_dim}, "
            f"ffn {self.ffn}, vocabulary {self.vocab}"
        )


LLAMA = Sizes(4096, 32, 8, 128, 14336, 128256, "bf16")
GPT2 = Sizes(768, 12, 12, 64, 3072, 50257, "bf16")
DEMO = Sizes(128, 4, 2, 32, 384, 1024, "fp32")
MODELS = {"llama-8b": LLAMA, "gpt2": GPT2, "demo": DEMO}  # what the benchmarks run
# of which single kernels are compiled, beside those of MODELS
GEMMA = Sizes(3584, 16, 8, 256, 14336, 256000, "bf16")  # Gemma-2-9B
BERT = Sizes(768, 12, 12, 64, 3072, 30522, "bf16")
GPT2_TINY = Sizes(128, 4, 4, 32, 512, 1024, "fp32")
