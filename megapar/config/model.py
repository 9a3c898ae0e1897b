"""What a model is: its parts in order, and what each holds and costs. Pure Python, without torch.

A part is what a pipeline stage holds as a whole: the embedding, a layer, the head. Stages are cut between parts, and
`megapar.models` has a builder for each kind. Counts are of the logical model, over all tensor-parallel ranks.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from megapar.config.policy import head_linear, layer_linears
from megapar.config.schema import ModelConfig, OptimConfig, PartOptions, TrainConfig
from megapar.update_rules import optimizer_kind

WIDTHS = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (2, 4)}  # bytes of train.dtype: computed in, accumulated in


@dataclass(frozen=True)
class Part:
    """One part of a model.

    name: unique in the model, such as `layers.3`; kind: which builder of `megapar.models` makes it
    receives: names of the tensors that cross a stage boundary in front of it
    weights: elements of its parameters; tied: how many of them other parts hold too; adapters: how many LoRA adds
    ties: names of the weights that it shares with other parts
    matmul, attention: FLOPs of its forward per token, in products with weights and in those of attention alone
    activation: bytes that it keeps of one micro-batch for its backward on one tensor-parallel rank, about
    """

    name: str
    kind: str
    receives: tuple[str, ...]
    weights: int
    tied: int = 0
    adapters: int = 0
    ties: tuple[str, ...] = ()
    matmul: float = 0.0
    attention: float = 0.0
    activation: float = 0.0


def parts(config: TrainConfig) -> list[Part]:
    """The parts of a resolved config's model, in the order of a forward pass."""
    model = config.model
    table = (model.vocab_size or 0) * model.hidden  # not known before the data has been read
    rows = model.token_types + (config.train.seq_length if model.position == "learned" else 0)
    embedding = table + rows * model.hidden + (_norm(model) if model.embedding_norm else 0)
    tie: Any = {"tied": table, "ties": ("embedding",)} if model.tied else {}
    linears = layer_linears(model).values()
    adapters = sum(linear.adapters(model.lora) for linear in linears)
    layer = Part(
        name="",
        kind="layer",
        receives=("hidden",),
        weights=sum(linear.weights for linear in linears) + _norms(model) + adapters,
        adapters=adapters,
        matmul=2.0 * sum(linear.matrix for linear in linears),
        activation=_layer_activation(config),
    )
    return [
        Part("embedding", "embedding", (), embedding, **tie),
        *(replace(layer, name=f"layers.{index}", attention=_attention(config, index)) for index in range(model.layers)),
        _head(config, tie if model.has_logits else {}),
    ]


def part_options(optim: OptimConfig, part: str) -> PartOptions:
    """What the parameters of a part have of their own: of the first pattern of `optim.groups` that its name matches."""
    matching = (options for pattern, options in (optim.groups or {}).items() if fnmatchcase(part, pattern))
    return next(matching, PartOptions())


def _attention(config: TrainConfig, layer: int) -> float:
    """FLOPs per token. A causal mask does not halve it: the torch kernels multiply all of it. Neither do they leave out
    what a window hides, and Triton's do."""
    model, length = config.model, config.train.seq_length
    seen = min(length, model.window or length) if model.windowed(layer) and _fused_attention(config) else length
    return 4.0 * model.heads * (model.head_dim or 0) * seen


def _head(config: TrainConfig, tie: Any) -> Part:
    model, dense = config.model, config.model.hidden * (config.model.hidden + 1)
    norm = 0 if model.norm_order == "post" and model.output != "mlm" else _norm(model)
    if not model.has_logits:
        scores = (model.classes or 0) * (model.hidden + 1) if model.output == "classes" else 0
        weights, matmul = norm + (dense if model.pooler else 0) + scores, 0.0
    else:
        head = head_linear(model)
        weights, matmul = head.weights + norm, 2.0 * head.matrix
        weights += (model.vocab_size or 0) if model.output_bias else 0
    if model.output == "mlm":
        weights, matmul = weights + dense, matmul + 2.0 * model.hidden**2
    return Part("head", "head", ("hidden",), weights, **tie, matmul=matmul, activation=_head_activation(config))


def _norm(model: ModelConfig) -> int:
    return model.hidden * (2 if model.norm == "layernorm" else 1)


def _norms(model: ModelConfig) -> int:
    """Elements of a layer's norms."""
    heads = {"none": 0, "head": 2, "all": model.heads + (model.kv_heads or 0)}[model.qk_norm]
    return (4 if model.norm_order == "sandwich" else 2) * _norm(model) + heads * (model.head_dim or 0)


def _tokens(config: TrainConfig) -> int:
    return config.train.micro_batch_size * config.train.seq_length


def _share_outside(config: TrainConfig) -> float:
    """The share of the tokens that a rank holds between tensor-parallel regions."""
    return 1 / config.parallel.tp if config.parallel.sequence_parallel else 1.0


def _layer_activation(config: TrainConfig) -> float:
    model, train, tp = config.model, config.train, config.parallel.tp
    assert model.kv_heads and model.head_dim and model.ffn
    size, wide = WIDTHS[train.dtype]
    outside = _share_outside(config)
    if train.recompute == "full":
        return _tokens(config) * model.hidden * outside * size
    # Norms: input and normalised values in the wide dtype; their outputs, read by qkv and up, in the other one.
    norms = (4 if model.norm_order == "sandwich" else 2) * model.hidden * (outside * 2 * wide + size)
    heads = (2 if model.qk_norm == "none" else 4) * (model.heads + model.kv_heads) * model.head_dim / tp * size
    recomputed = train.recompute == "selective" or _fused_attention(config)
    probabilities = 0.0 if recomputed else model.heads * train.seq_length / tp * size
    mlp = (4 if model.gated else 2) * model.ffn / tp * size
    return _tokens(config) * (norms + heads + probabilities + mlp)


def _fused_attention(config: TrainConfig) -> bool:
    """Whether attention is the Triton kernel, which makes its probabilities anew in backward; fp64 has none."""
    device, backend = config.train.device, config.kernels.backend
    return config.train.dtype != "fp64" and (
        backend in ("triton", "interpret") or (backend, device) == ("auto", "cuda")
    )


def _head_activation(config: TrainConfig) -> float:
    """The last norm as in a layer, and the logits, of which the gradient takes the place."""
    model = config.model
    size, wide = WIDTHS[config.train.dtype]
    norm = model.hidden * (_share_outside(config) * 2 * wide + size)
    logits = (model.vocab_size or 0) / config.parallel.tp if model.has_logits else 0
    return _tokens(config) * (norm + logits * size)


def state_bytes(config: TrainConfig, part: Part) -> float:
    """Bytes per parameter of a part: weight, gradient, the optimizer's state, and a master copy where the weight is
    bf16. Of a layer those of its matrices, next to which norms and biases are nothing. What LoRA freezes has weights
    alone."""
    weight, wide = WIDTHS[config.train.dtype]
    kind = optimizer_kind(config.optim.name)
    if kind.others is not None and part.kind != "layer":
        kind = optimizer_kind(kind.others)
    optimizer = len(kind.state) * wide + (wide if weight < wide else 0)
    owners = config.parallel.layout.over("samples") if config.parallel.zero else 1
    trained = part.adapters / max(1, part.weights) if config.model.lora.rank else 1.0
    return weight + (wide + optimizer / owners) * trained


def least_bytes(config: TrainConfig) -> float:
    """Bytes that the ranks of a run hold at least, all together: state, and the activations of one micro-batch.

    Of an estimate, from one layer, so that a model of 10^9 layers costs no more to refuse than one of ten.
    """
    layers, one = config.model.layers, parts(replace(config, model=replace(config.model, layers=1)))
    count = {part.name: layers if part.kind == "layer" else 1 for part in one}
    tied = one[-1].tied if config.model.tied else 0
    state = sum(count[part.name] * part.weights * state_bytes(config, part) for part in one)
    state -= tied * state_bytes(config, one[-1])
    kept = sum(count[part.name] * part.activation for part in one) * config.parallel.tp
    return config.parallel.layout.over("samples") * (state + kept)


def model_weights(config: TrainConfig) -> int:
    """Elements of all parameters of a model, a tied one once."""
    whole = parts(config)
    copies = sum(part.tied for part in whole) - max((part.tied for part in whole), default=0)
    return sum(part.weights for part in whole) - copies
