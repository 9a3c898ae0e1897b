"""What a layer is built with: the mesh, the precision, and the registry of the parameters of this rank's stages."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megapar.config.model import Part
from megapar.mesh import Axis, Mesh
from megapar.parallel.overlap import Overlap, Overlaps
from megapar.parallel.record import ParameterRecord, Shard
from megapar.parallel.rotary import Rotary
from megapar.parallel.weight_grad import LocalParameter, Piece, WeightGrads


@dataclass
class StageContext:
    """Given to every layer of a rank's stages when they are built.

    dtype: compute dtype; `wide_dtype` (at least fp32) is for losses, norms, tables and accumulation.
    parameters: every parameter of this rank's stages in the order of construction.
    stage, part: what is being built; part may be None, as for a builder of the user's own that names none.
    placement: the pipeline rank of every stage. frozen: only adapters are trained.
    overlaps: how each matmul of the tensor-parallel layers meets its peers.
    """

    mesh: Mesh
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    tp_overlap: str = "auto"
    seed: int = 0
    placement: tuple[int, ...] = (0,)
    stage: int = 0
    part: Part | None = None
    frozen: bool = False
    weight_grads: WeightGrads = field(default_factory=WeightGrads)
    parameters: list[LocalParameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.overlaps = Overlaps(self.mesh, self.tp_overlap, self.weight_grads)
        self._holders: dict[str, Axis | None] = {}
        self._part_of_tie: dict[str, Part | None] = {}
        self._rope_tables: dict[tuple[int, Rotary], Tensor] = {}

    @property
    def tp(self) -> Axis:
        return self.mesh["tp"]

    @property
    def device(self) -> torch.device:
        return self.mesh.device

    @property
    def wide_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def splits_tokens(self) -> bool:
        """Outside the tensor-parallel regions every rank holds its own share of the tokens."""
        return self.sequence_parallel and self.tp.size > 1

    @contextmanager
    def whole_tokens(self) -> Iterator[None]:
        """Every rank has all tokens inside, as where a text is written token by token: there is nothing to split."""
        kept, self.sequence_parallel = self.sequence_parallel, False
        try:
            yield
        finally:
            self.sequence_parallel = kept

    def overlap(self, owner: LocalParameter) -> Overlap:
        """How the matmul of this parameter's layer meets its tensor-parallel peers."""
        return self.overlaps.of(self.stage, owner)

    def local_tokens(self, tokens: int) -> slice:
        """This rank's share of `tokens` flattened tokens outside the tensor-parallel regions."""
        if not self.splits_tokens:
            return slice(0, tokens)
        share = tokens // self.tp.size
        return slice(self.tp.index * share, (self.tp.index + 1) * share)

    def rope_table(self, length: int, rotary: Rotary) -> Tensor:
        """`Rotary.table` in the wide dtype [length, channels], made once for each."""
        key = (length, rotary)
        if key not in self._rope_tables:
            self._rope_tables[key] = rotary.table(length, self.wide_dtype, self.device)
        return self._rope_tables[key]

    def tie(self, name: str, stages: Iterable[int], part: Part | None = None) -> None:
        """Declare which stages hold a copy of the parameters that are tied under this name, and the part of the model
        that they belong to on all of them.

        Collective, before they are declared: on every rank, whether or not it has one of these stages.
        """
        ranks = {self.placement[stage] for stage in stages}
        self._holders[name] = self.mesh.among(ranks) if len(ranks) > 1 else None
        self._part_of_tie[name] = part

    def holders(self, parameter: LocalParameter) -> Axis | None:
        """The pipeline ranks that hold a copy of a parameter, None if this one alone does."""
        return None if parameter.tie is None else self._holders[parameter.tie]

    def shard(self, record: ParameterRecord) -> Shard:
        """What this rank holds of a record."""
        return record.shard(self.mesh.layout, self.mesh.place)

    def parameter(self, module: nn.Module, attribute: str, *records: ParameterRecord) -> LocalParameter:
        """Declare `module.attribute`: this rank's shards of the records, stacked along dim 0.

        No memory is taken: the tensor is made when the rank's buffers are. A record whose tie is held here already is
        one more use of that parameter.
        """
        tie = records[0].tie
        assert tie is None or tie in self._holders, f"declare the stages that hold {tie} first: context.tie"
        tied = [held for held in self.parameters if tie is not None and held.tie == tie]
        if tied:
            tied[0].uses += 1
            return tied[0]
        pieces: list[Piece] = []
        rows = 0
        for record in records:
            shard = self.shard(record)
            length = shard.shape[0]
            pieces.append(Piece(record, shard, rows, rows + length))
            rows += length
        shape = (rows, *pieces[0].shard.shape[1:])
        assert all(piece.shard.shape[1:] == shape[1:] for piece in pieces)
        widest = sum(record.widest(self.mesh.layout) for record in records)
        part = self.part if tie is None else self._part_of_tie[tie]
        frozen = self.frozen and not records[0].adapter
        local = LocalParameter(module, attribute, shape, pieces, widest, self.stage, part, frozen)
        module.register_parameter(attribute, nn.Parameter(torch.empty(shape, device="meta")))
        self.parameters.append(local)
        return local

    def seeded(self, name: str):
        """torch's generators fixed by (seed, name): a plain module built inside starts the same on every rank."""
        return _Seeded(self.seed, name, self.device)


class _Seeded:
    def __init__(self, seed: int, name: str, device: torch.device) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        self.seed = int.from_bytes(digest, "little") >> 1
        self.fork = torch.random.fork_rng([device.index] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(*error)  # type: ignore[arg-type]
