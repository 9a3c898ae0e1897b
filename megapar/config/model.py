"""What a model is: its parts in order, and what each holds and costs. Pure Python, without torch.

A part is what a pipeline stage holds as a whole: the embedding, a layer, the head. Stages are cut between parts, and
`megapar.models` has a builder for each kind. Counts are of the logical model, over all tensor-parallel ranks.
"""

from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from megapar.config.keys import changed
from megapar.config.policy import Linear, head_linear, layer_linears
from megapar.config.schema import ModelConfig, OptimConfig, PartOptions, TrainConfig
from megapar.update_rules import optimizer_kind

WIDTHS = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (2, 4)}  # bytes of train.dtype: computed in, accumulated in


@dataclass(frozen=True)
class Part:
    """One part of a model.

    name: unique in the model, such as `layers.3`; kind: which builder of `megapar.models` makes it
    stack: "encoder" of what reads the source of an encoder-decoder, else empty
    receives: names of the tensors that cross a stage boundary in front of it
    weights: elements of its parameters; tied: how many of them other parts hold too; adapters: how many LoRA adds
    ties: names of the weights that it shares with other parts
    matmul, attention: FLOPs of its forward per token of `train.seq_length`, in products with weights and in those of
        attention alone
    activation: bytes that it keeps of one micro-batch for its backward on one tensor-parallel rank, about
    """

    name: str
    kind: str
    receives: tuple[str, ...]
    weights: int
    stack: str = ""
    tied: int = 0
    adapters: int = 0
    ties: tuple[str, ...] = ()
    matmul: float = 0.0
    attention: float = 0.0
    activation: float = 0.0


def parts(config: TrainConfig) -> list[Part]:
    """The parts of a resolved config's model, in the order of a forward pass: an encoder's first.

    What crosses a boundary inside the encoder is its stream, `memory`, which inside the decoder goes along with the
    decoder's own, `hidden`.
    """
    model, layers = config.model, config.model.layers
    head_tie = model.has_logits and model.tied
    decoder = [
        _embedding(config, "", model.shares_embedding),
        *(_layer(config, index) for index in range(layers)),
        _head(config, _tied("embedding", _table(model)) if head_tie else {}),
    ]
    if not model.encoder.layers:
        return decoder
    encoder = [
        _embedding(config, "encoder", model.encoder.shared),
        *(_layer(config, index, "encoder") for index in range(model.encoder.layers)),
        Part("encoder.norm", "norm", ("memory",), _norm(model), "encoder"),
    ]
    start, *following, head = decoder
    return [*encoder, replace(start, receives=("memory",)), *following, head]


def linears_of(model: ModelConfig, part: Part) -> dict[str, Linear]:
    """The products of a layer, by place."""
    return layer_linears(model, cross=model.encoder.layers > 0 and not part.stack)


def tokens_read(config: TrainConfig, part: Part, linear: Linear | None = None) -> int:
    """Tokens of a micro-batch that a part reads, or one of its products."""
    source = part.stack == "encoder" or (linear is not None and linear.memory)
    length = config.train.source_length if source else config.train.seq_length
    assert length is not None, "resolve the configuration first"
    return config.train.micro_batch_size * length


def _table(model: ModelConfig) -> int:
    return (model.vocab_size or 0) * model.hidden  # not known before the data has been read


def _tied(name: str, elements: int) -> Any:
    return {"tied": elements, "ties": (name,)}


def _embedding(config: TrainConfig, stack: str, tied: bool) -> Part:
    model, train = config.model, config.train
    length = (train.source_length if stack else train.seq_length) or 0
    rows = model.token_types + (length if model.position == "learned" else 0)
    weights = _table(model) + rows * model.hidden + (_norm(model) if model.embedding_norm else 0)
    name = f"{stack}.embedding" if stack else "embedding"
    return Part(name, "embedding", (), weights, stack, **(_tied("embedding", _table(model)) if tied else {}))


def _layer(config: TrainConfig, index: int, stack: str = "") -> Part:
    """Costs are per token of the decoder, of which a sample of an encoder may have more or fewer."""
    model, train = config.model, config.train
    prefix = f"{stack}." if stack else ""
    part = Part(f"{prefix}layers.{index}", "layer", ("memory",) if stack else ("hidden",), 0, stack)
    linears = linears_of(model, part).values()
    adapters = sum(linear.adapters(model.lora) for linear in linears)
    cross = any(linear.memory for linear in linears)
    share = {linear: tokens_read(config, part, linear) / _tokens(config) for linear in linears}
    biases = model.relative_buckets * model.heads if model.position == "relative" else 0
    tie = _tied(f"{prefix}relative", biases) if biases else {}
    source = (train.source_length or 0) / train.seq_length
    attention = _to_source(config) * source if stack else _attention(config, index)
    return replace(
        part,
        receives=("hidden", "memory") if cross else part.receives,
        weights=sum(linear.weights for linear in linears) + _norms(model, cross) + adapters + biases,
        adapters=adapters,
        matmul=2.0 * sum(linear.matrix * share[linear] for linear in linears),
        attention=attention + (_to_source(config) if cross else 0.0),
        activation=_layer_activation(config, part, cross),
        **tie,
    )


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


def _to_source(config: TrainConfig) -> float:
    """FLOPs per token that attends to all of a source."""
    return 4.0 * config.model.heads * (config.model.head_dim or 0) * (config.train.source_length or 0)


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
    kept = _head_activation(config)
    return Part("head", "head", ("hidden",), weights, **tie, matmul=matmul, activation=kept)


def _norm(model: ModelConfig) -> int:
    return model.hidden * (2 if model.norm == "layernorm" else 1)


def _norms(model: ModelConfig, cross: bool) -> int:
    """Elements of a layer's norms."""
    heads = {"none": 0, "head": 2, "all": model.heads + (model.kv_heads or 0)}[model.qk_norm]
    return _hidden_norms(model, cross) * _norm(model) + heads * (model.head_dim or 0)


def _hidden_norms(model: ModelConfig, cross: bool) -> int:
    """Norms of the hidden width in a layer."""
    return (3 if cross else 2) * (2 if model.norm_order == "sandwich" else 1)


def _tokens(config: TrainConfig) -> int:
    return config.train.micro_batch_size * config.train.seq_length


def _share_outside(config: TrainConfig) -> float:
    """The share of the tokens that a rank holds between tensor-parallel regions."""
    return 1 / config.parallel.tp if config.parallel.sequence_parallel else 1.0


def _layer_activation(config: TrainConfig, part: Part, cross: bool) -> float:
    model, train, tp = config.model, config.train, config.parallel.tp
    assert model.kv_heads and model.head_dim and model.ffn
    size, wide = WIDTHS[train.dtype]
    outside, tokens = _share_outside(config), tokens_read(config, part)
    if train.recompute == "full":
        return tokens * model.hidden * outside * size
    # Norms: input and normalised values in the wide dtype; their outputs, read by qkv and up, in the other one.
    norms = _hidden_norms(model, cross) * model.hidden * (outside * 2 * wide + size)
    heads = (2 if model.qk_norm == "none" else 4) * (model.heads + model.kv_heads) * model.head_dim / tp * size
    recomputed = train.recompute == "selective" or _fused_attention(config)
    scores = 0.0 if recomputed else model.heads / tp * size
    mlp = (4 if model.gated else 2) * model.ffn / tp * size
    one = tokens * (norms + heads + scores * tokens / train.micro_batch_size + mlp)
    if not cross:
        return one
    source = tokens_read(config, replace(part, stack="encoder"))
    memory = source * (model.hidden + 2 * model.kv_heads * model.head_dim / tp) * size
    queries = 2 * model.heads * model.head_dim / tp * size + scores * source / train.micro_batch_size
    return one + memory + tokens * queries


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
    model = config.model
    one = parts(changed(config, {"model.layers": 1, "model.encoder.layers": min(1, model.encoder.layers)}))
    layers = {"": model.layers, "encoder": model.encoder.layers}
    count = {part.name: layers[part.stack] if part.kind == "layer" else 1 for part in one}
    tied = sum(_copies(one).values())
    state = sum(count[part.name] * part.weights * state_bytes(config, part) for part in one)
    state -= tied * state_bytes(config, one[-1])
    kept = sum(count[part.name] * part.activation for part in one) * config.parallel.tp
    return config.parallel.layout.over("samples") * (state + kept)


def _copies(whole: list[Part]) -> dict[str, int]:
    """Elements that parts hold of each tied weight beyond one copy."""
    found: dict[str, list[int]] = {}
    for part in whole:
        for name in part.ties:
            found.setdefault(name, []).append(part.tied)
    return {name: sum(held) - max(held) for name, held in found.items()}


def model_weights(config: TrainConfig) -> int:
    """Elements of all parameters of a model, a tied one once."""
    whole = parts(config)
    return sum(part.weights for part in whole) - sum(_copies(whole).values())
