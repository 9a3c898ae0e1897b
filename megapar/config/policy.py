"""The tensor-parallel policy as data: the matrix products of a model, and how each is cut.

Layers are built from it (`megapar.models`), weights and FLOPs are counted from it (`megapar.config.model`), and what a
rank sends follows from it (`megapar.plan`). Shapes on a rank, letters as in `megapar.models`:

| place         | split      | what is cut    | reads            | writes             |
|---------------|------------|----------------|------------------|--------------------|
| embedding     | vocabulary | token ids      | ids [T]          | x [t, H]           |
| norms         | none       |                | x [t, H]         | x [t, H]           |
| attention.qkv | column     | heads          | x [t, H]         | qkv [T, (N+2K)*D]  |
| attention.out | row        | heads          | y [T, N*D]       | x [t, H]           |
| cross.q       | column     | heads          | x [t, H]         | q [T, N*D]         |
| cross.kv      | column     | heads          | memory [t, H]    | kv [T, 2K*D]       |
| cross.out     | row        | heads          | y [T, N*D]       | x [t, H]           |
| mlp.up        | column     | inner features | x [t, H]         | gate, up [T, F]    |
| mlp.down      | row        | inner features | h [T, F]         | x [t, H]           |
| project.up    | column     | features       | x [t, H']        | h [T, H]           |
| project.down  | row        | features       | h [T, H]         | x [t, H]           |
| head          | column     | token ids      | x [t, H]         | logits [T, V]      |

`cross` is attention to an encoder's output, the memory, in the layers of a decoder that has an encoder in front of it.
A projector brings the output of an encoder of images or sound, H' wide, to the width of the model.
"""

from dataclasses import dataclass
from typing import Literal

from megapar.config.model_schema import LoraConfig
from megapar.config.schema import ModelConfig


@dataclass(frozen=True)
class Output:
    """One logical weight of a product: its name behind the place's, its features, and the blocks that can't be cut
    (heads); None: single features."""

    name: str
    features: int
    blocks: int | None = None


@dataclass(frozen=True)
class Linear:
    """A matrix product with weights, over all ranks.

    split: `column` cuts the features of every output, `row` those of the input
    inputs: features of the input, of which `blocks` can't be cut (row)
    outputs: several that read the same input are one product
    residual: it writes to the residual stream; memory: it reads the encoder's output
    """

    split: Literal["column", "row"]
    inputs: int
    outputs: tuple[Output, ...]
    bias: bool
    blocks: int | None = None
    residual: bool = False
    memory: bool = False

    def adapters(self, lora: LoraConfig) -> int:
        """Elements of the adapters of its outputs."""
        adapted = [output for output in self.outputs if lora.adapts(output.name)]
        return sum(lora.rank * (self.inputs + output.features) for output in adapted)

    @property
    def features(self) -> int:
        """Of all outputs."""
        return sum(output.features for output in self.outputs)

    @property
    def weights(self) -> int:
        """Elements of its matrices and biases."""
        return self.matrix + (self.features if self.bias else 0)

    @property
    def matrix(self) -> int:
        """Elements of its matrices."""
        return self.inputs * self.features


def layer_linears(model: ModelConfig, cross: bool = False) -> dict[str, Linear]:
    """The products of a layer of a resolved model, by place. cross: it attends to an encoder's output, too."""
    heads, kv_heads, channels, ffn = model.heads, model.kv_heads, model.head_dim, model.ffn
    assert kv_heads and channels and ffn, "resolve the configuration first"
    qkv = (
        Output("q", heads * channels, heads),
        Output("k", kv_heads * channels, kv_heads),
        Output("v", kv_heads * channels, kv_heads),
    )
    up = (*((Output("gate", ffn),) if model.gated else ()), Output("up", ffn))
    into_stream = (Output("out", model.hidden),), (Output("down", model.hidden),)
    qkv_bias, out_bias = model.biases.values()
    out = Linear("row", heads * channels, into_stream[0], out_bias, heads, residual=True)
    to_memory = {
        "cross.q": Linear("column", model.hidden, qkv[:1], qkv_bias),
        "cross.kv": Linear("column", model.hidden, qkv[1:], qkv_bias, memory=True),
        "cross.out": out,
    }
    return {
        "attention.qkv": Linear("column", model.hidden, qkv, qkv_bias),
        "attention.out": out,
        **(to_memory if cross else {}),
        "mlp.up": Linear("column", model.hidden, up, model.bias),
        "mlp.down": Linear("row", ffn, into_stream[1], model.bias, residual=True),
    }


def projector_linears(model: ModelConfig, hidden: int) -> dict[str, Linear]:
    """The products from a medium's encoder to the trunk's width (Liu et al. 2023, LLaVA-1.5). model: the encoder's."""
    return {
        "project.up": Linear("column", model.hidden, (Output("up", hidden),), model.bias),
        "project.down": Linear("row", hidden, (Output("down", hidden),), model.bias),
    }


def head_linear(model: ModelConfig) -> Linear:
    """The product to logits. Tied, its weight is the embedding's."""
    name = "embedding" if model.tied else "head"
    return Linear("column", model.hidden, (Output(name, model.vocab_size or 0),), bias=False)
