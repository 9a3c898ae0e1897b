"""What a model is: its parts in order, and what each holds and costs. Pure Python, without torch.

A part is what a pipeline stage holds as a whole: the embedding, a layer, the head. Stages are cut between parts, and
`megapar.models` has a builder for each kind. Counts are of the logical model, over all tensor-parallel ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from megapar.config.keys import changed
from megapar.config.policy import Linear, head_linear, layer_linears, projector_linears
from megapar.config.schema import ModelConfig, OptimConfig, PartOptions, TrainConfig
from megapar.config.stacks import (
    MEDIA,
    TRUNK,
    media,
    medium_features,
    prefix,
    stack_config,
    stack_model,
    stack_tokens,
    stacks,
)
from megapar.update_rules import optimizer_kind

WIDTHS = {"fp64": (8, 8), "fp32": (4, 4), "bf16": (2, 4)}  # bytes of train.dtype: computed in, accumulated in


@dataclass(frozen=True)
class Part:
    """One part of a model.

    name: unique in the model, such as `layers.3`; kind: which builder of `megapar.models` makes it
    stack: that it is of (`config/stacks.py`), empty of the trunk
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
    """The parts of a resolved config's model, in the order of a forward pass: encoders' first.

    What crosses a boundary inside an encoder is its own stream, beside those of encoders in front of it. An encoder's
    output, `memory`, goes along inside the decoder with the decoder's own, `hidden`; those of media end in the trunk's
    embedding.
    """
    model = config.model
    head_tie = model.has_logits and model.tied
    found: list[Part] = []
    ahead: tuple[str, ...] = ()  # of encoders in front
    for name in media(model):
        found += [replace(part, receives=(*ahead, *part.receives)) for part in _medium(config, name)]
        ahead = (*ahead, f"{name}_tokens")
    if model.encoder.layers:
        found += [
            _embedding(config, "encoder", model.encoder.shared),
            *(_layer(config, index, "encoder") for index in range(model.encoder.layers)),
            Part("encoder.norm", "norm", ("memory",), _norm(model), "encoder"),
        ]
        ahead = ("memory",)
    return [
        *found,
        replace(_embedding(config, TRUNK, model.shares_embedding), receives=ahead),
        *(_layer(config, index) for index in range(model.layers)),
        _head(config, _tied("embedding", _table(model)) if head_tie else {}),
    ]


def linears_of(model: ModelConfig, part: Part) -> dict[str, Linear]:
    """The products of a layer or a projector, by place."""
    own = stack_model(model, part.stack)
    if part.kind == "projector":
        return projector_linears(own, model.hidden)
    return layer_linears(own, cross=own.encoder.layers > 0)


def tokens_read(config: TrainConfig, part: Part, linear: Linear | None = None) -> int:
    """Tokens of a micro-batch that a part reads, or one of its products."""
    stack = "encoder" if linear is not None and linear.memory else part.stack
    return config.train.micro_batch_size * stack_tokens(config, stack)


def _table(model: ModelConfig) -> int:
    return (model.vocab_size or 0) * model.hidden  # not known before the data has been read


def _tied(name: str, elements: int) -> Any:
    return {"tied": elements, "ties": (name,)}


def _embedding(config: TrainConfig, stack: str, tied: bool) -> Part:
    model = config.model
    length = stack_tokens(config, stack) if model.position == "learned" else 0
    kinds = 1 + len(MEDIA) if model.has_media else 0
    rows = model.token_types + length + kinds
    weights = _table(model) + rows * model.hidden + (_norm(model) if model.embedding_norm else 0)
    name = f"{prefix(stack)}embedding"
    return Part(name, "embedding", (), weights, stack, **(_tied("embedding", _table(model)) if tied else {}))


def _medium(config: TrainConfig, stack: str) -> list[Part]:
    """The parts of an encoder of images or sound."""
    own = stack_config(config, stack)
    share = own.train.seq_length / config.train.seq_length
    inputs = medium_features(config.model, stack)
    weights = own.model.hidden * (inputs + 1)
    products = projector_linears(own.model, config.model.hidden).values()
    return [
        Part(f"{stack}.embedding", "embedding", (), weights, stack, matmul=2.0 * own.model.hidden * inputs * share),
        *(_layer(config, index, stack) for index in range(own.model.layers)),
        Part(
            f"{stack}.projector",
            "projector",
            (stack,),
            _norm(own.model) + sum(linear.weights + linear.adapters(config.model.lora) for linear in products),
            stack,
            adapters=sum(linear.adapters(config.model.lora) for linear in products),
            matmul=2.0 * sum(linear.matrix for linear in products) * share,
        ),
    ]


def _layer(config: TrainConfig, index: int, stack: str = "") -> Part:
    """Costs are per token of the trunk, of which a sample of an encoder may have more or fewer."""
    own = stack_config(config, stack)
    model = own.model
    stream = {TRUNK: "hidden", "encoder": "memory"}.get(stack, stack)
    part = Part(f"{prefix(stack)}layers.{index}", "layer", (stream,), 0, stack)
    linears = linears_of(config.model, part).values()
    adapters = sum(linear.adapters(model.lora) for linear in linears)
    cross = any(linear.memory for linear in linears)
    share = {linear: tokens_read(config, part, linear) / _tokens(config) for linear in linears}
    biases = model.relative_buckets * model.heads if model.position == "relative" else 0
    tie = _tied(f"{prefix(stack)}relative", biases) if biases else {}
    attention = _attention(own, index) * own.train.seq_length / config.train.seq_length
    return replace(
        part,
        receives=("hidden", "memory") if cross else part.receives,
        weights=sum(linear.weights for linear in linears) + _norms(model, cross) + adapters + biases,
        adapters=adapters,
        matmul=2.0 * sum(linear.matrix * share[linear] for linear in linears),
        attention=attention + (_to_source(config) if cross else 0.0),
        activation=_layer_activation(own, cross),
        **tie,
    )


def medium_flops(model: ModelConfig, name: str, lengths: Sequence[int]) -> float:
    """FLOPs of a forward pass through the encoder of a medium, of images or sounds of so many tokens each."""
    own = stack_model(model, name)
    in_layers = own.layers * sum(linear.matrix for linear in layer_linears(own).values())
    in_ends = own.hidden * medium_features(model, name)
    in_ends += sum(linear.matrix for linear in projector_linears(own, model.hidden).values())
    scores = own.layers * own.heads * (own.head_dim or 0)
    return 2.0 * (in_layers + in_ends) * sum(lengths) + 4.0 * scores * sum(length**2 for length in lengths)


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


def _layer_activation(config: TrainConfig, cross: bool) -> float:
    model, train, tp = config.model, config.train, config.parallel.tp
    assert model.kv_heads and model.head_dim and model.ffn
    size, wide = WIDTHS[train.dtype]
    outside, tokens = _share_outside(config), _tokens(config)
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
    source = train.micro_batch_size * stack_tokens(config, "encoder")
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
    layers = {name: stack_model(config.model, name).layers for name in stacks(config.model)}
    one = parts(changed(config, {f"model.{prefix(name)}layers": 1 for name in layers}))
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
