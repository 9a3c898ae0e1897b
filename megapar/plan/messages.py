"""What a rank sends in one training step, by axis, from the configuration alone.

Counted are operations that this rank takes part in, and the bytes of its own operand: the tensor that it gives to a
collective or sends. Of a pipeline's transfers the sends are counted. A reduce-scatter counts with its whole operand, as
it travels on a CPU. A test compares the counts with what runs call. With images and sound they are about right: a
micro-batch has more or fewer of them than the average, which is what is counted.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megapar.config.model import WIDTHS, Part, linears_of, tokens_read
from megapar.config.policy import Linear, head_linear
from megapar.config.schema import TrainConfig
from megapar.config.stacks import MEDIA, STREAMS, media, stack_model, stack_tokens
from megapar.config.stages import stage_parts
from megapar.optim.matrices import operands
from megapar.optim.optimizer import is_matrix, works_on_matrices
from megapar.parallel.compression import BLOCK, Matrix, gaps, matrices_of
from megapar.parallel.engines import Chunked, Operation, choose
from megapar.parallel.grad_sync import GradSync
from megapar.part import DTYPES, ModelPart

STATISTICS = 3  # numbers per token that tensor-parallel ranks exchange for the loss


@dataclass
class Messages:
    """count: operations; bytes: of this rank's operands."""

    count: int = 0
    bytes: int = 0

    def add(self, count: int, size: float) -> None:
        self.count += count
        self.bytes += round(size)


def messages(config: TrainConfig, part: ModelPart) -> dict[str, Messages]:
    """By axis, in one step of the rank whose part of the model this is."""
    found: dict[str, Messages] = defaultdict(Messages)
    row = part.schedule.rows[part.mesh["pp"].index]
    stages = stage_parts(config)
    last = len(stages) - 1
    for action in row:
        if action.kind == "F":
            _tensor_parallel(config, stages[action.stage], ["forward"], found["tp"])
            if action.stage == last:
                _loss(config, found["tp"])
        elif action.kind in ("B", "I"):
            again = ["forward"] if config.train.recompute == "full" else []
            _tensor_parallel(config, stages[action.stage], [*again, "backward"], found["tp"], again=bool(again))
        elif action.kind.startswith("SEND"):
            crossing = stages[action.stage + action.kind.endswith("F")][0].receives
            found["pp"].add(len(crossing), sum(_stream_bytes(config, name) for name in crossing))
    _reductions(config, part, found)
    return {axis: one for axis, one in found.items() if one.count}


def _tokens(config: TrainConfig) -> int:
    return config.train.micro_batch_size * config.train.seq_length


def _stream_bytes(config: TrainConfig, name: str) -> int:
    """Of a tensor that passes between stages."""
    share = config.parallel.tp if config.parallel.sequence_parallel else 1
    stream = STREAMS[name]
    tokens = config.train.micro_batch_size * stack_tokens(config, stream.tokens)
    return tokens // share * stack_model(config.model, stream.width).hidden * WIDTHS[config.train.dtype][0]


def _tensor_parallel(
    config: TrainConfig, parts: Sequence[Part], directions: Sequence[str], found: Messages, again: bool = False
) -> None:
    """One pass of a micro-batch through a stage."""
    tp, split = config.parallel.tp, config.parallel.sequence_parallel
    if tp == 1:
        return
    for part in parts:
        size = WIDTHS[config.train.dtype][0]
        whole = tokens_read(config, part) * config.model.hidden * size
        for direction in directions:
            if part.kind in ("layer", "projector"):
                if part.kind == "projector" and again and direction == "forward":
                    continue  # layers alone are computed again
                for linear in linears_of(config.model, part).values():
                    tokens = tokens_read(config, part, linear)
                    _linear(config, linear, direction, tokens, found)
                    _adapters(config, linear, direction, tokens, found)
            elif again and direction == "forward":
                continue
            elif part.kind == "head" and config.model.has_logits:
                _linear(config, head_linear(config.model), direction, _tokens(config), found)
            elif part.kind == "head" and split and direction == "forward":
                found.add(1, whole / tp)
            elif part.kind == "embedding" and part.stack not in MEDIA and (direction == "forward" or split):
                found.add(1, whole if direction == "forward" else whole / tp)
                for name in media(config.model) if split else ():  # a patch's place may be another rank's
                    tokens = config.train.micro_batch_size * stack_tokens(config, name)
                    of_medium = tokens * config.model.hidden * size
                    found.add(1, of_medium / tp if direction == "forward" else of_medium)


def _linear(config: TrainConfig, linear: Linear, direction: str, tokens: int, found: Messages) -> None:
    """The collective of a product, or none: see the table of `megapar.parallel.overlap`."""
    split, enters = config.parallel.sequence_parallel, linear.split == "column"
    hidden = linear.inputs if enters else linear.features
    size = tokens * hidden * WIDTHS[config.train.dtype][0]
    tp = config.parallel.tp
    gathers = enters == (direction == "forward")  # at the entry of the region forward, at its exit backward
    if gathers and not split:
        return
    operation: Operation = "all_gather_matmul" if gathers else "matmul_reduce_scatter" if split else "matmul_all_reduce"
    inner = (linear.features if enters else linear.inputs) // tp
    rows = tokens // tp if gathers else tokens
    columns = (hidden, inner) if gathers else (inner, hidden)
    found.add(_pieces(config, operation, rows, columns), size / tp if gathers else size)


def _adapters(config: TrainConfig, linear: Linear, direction: str, tokens: int, found: Messages) -> None:
    """The collective of a product's adapters, or none: as the product's own, of their inner width."""
    lora, split, enters = config.model.lora, config.parallel.sequence_parallel, linear.split == "column"
    width = lora.rank * sum(lora.adapts(output.name) for output in linear.outputs)
    gathers = enters == (direction == "forward")
    if width and (split or not gathers):
        size = tokens * width * WIDTHS[config.train.dtype][0]
        found.add(1, size / config.parallel.tp if gathers else size)


def _pieces(config: TrainConfig, operation: Operation, rows: int, sizes: tuple[int, int]) -> int:
    """How many collectives an operation on x [rows, K] and w [K, N] is."""
    if config.parallel.tp_overlap in ("serial", "symmetric"):
        return 1
    x = torch.empty(rows, sizes[0], dtype=DTYPES[config.train.dtype], device="meta")
    w = torch.empty(sizes, dtype=x.dtype, device="meta")
    device, tp = config.train.device, config.parallel.tp
    engine = choose(config.parallel.tp_overlap, operation, x, w, tp, device="cuda" if device == "cuda" else "cpu")
    if not isinstance(engine, Chunked):
        return 1
    return len(engine.cut(rows // tp if operation == "matmul_reduce_scatter" else rows))


def _loss(config: TrainConfig, found: Messages) -> None:
    if config.parallel.tp > 1 and config.model.has_logits:
        found.add(1, _tokens(config) * STATISTICS * WIDTHS[config.train.dtype][1])


def _reductions(config: TrainConfig, part: ModelPart, found: dict[str, Messages]) -> None:
    """Sums of gradients, the norm, matrices that are updated as a whole, and with ZeRO-1 the new parameters."""
    size, wide = WIDTHS[config.train.dtype]
    buffers = part.buffers
    sync = GradSync(buffers)
    for sums in sync.partial_sums:
        for axis, views in sums:
            found[axis.name].add(1, sum(view.numel() for view in views) * wide)
    for bucket in buffers.buckets:
        if part.context.holders(next(iter(bucket.offsets))) is not None:
            found["pp"].add(1, bucket.size * wide)
        if bucket.axis.size == 1:
            continue
        for operand in _reduction(config, matrices_of(bucket), bucket.size, bucket.axis.size, buffers.zero):
            found[bucket.axis.name].add(1, operand)
        if buffers.zero:
            found[bucket.axis.name].add(1, bucket.size // bucket.axis.size * size)
    if part.mesh.distinct.size > 1:
        found["world"].add(1, 8)
    if part.mesh.stage.size > 1 and works_on_matrices(config.optim):
        for elements in operands(buffers, is_matrix):
            found[part.mesh.stage.name].add(1, elements * wide)


def _reduction(config: TrainConfig, matrices: Sequence[Matrix], size: int, ranks: int, zero: bool) -> list[int]:
    """Bytes of the operands of a bucket's reduction, see `megapar.parallel.compression`."""
    method, wide = config.parallel.grad_compression, WIDTHS[config.train.dtype][1]
    if method == "none":
        return [size * wide]
    if method == "powersgd":
        rank = config.parallel.powersgd_rank
        chosen = [one for one in matrices if rank * (one.rows + one.columns) < one.rows * one.columns]
        left, right = (sum(getattr(one, side) * min(rank, one.rows) for one in chosen) for side in ("rows", "columns"))
        return [_gaps(chosen, size) * wide, left * wide, right * wide]
    length = size // ranks
    payload = 2 * length if method == "bf16" else -(-length // BLOCK) * (BLOCK + 4)
    return [_gaps(matrices, size) * wide, ranks * payload, *([] if zero else [payload])]


def _gaps(matrices: Sequence[Matrix], size: int) -> int:
    return sum(run.stop - run.start for run in gaps(matrices, size))
