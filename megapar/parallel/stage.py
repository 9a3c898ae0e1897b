"""What a layer is built with: the mesh, the precision, and the books of the stage's parameters."""

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megapar.kernels.comm.symmetric import SymmetricMemory
from megapar.mesh import Axis, Mesh
from megapar.parallel.engines import sharing_memory
from megapar.parallel.overlap import Overlap
from megapar.parallel.record import Given, ParameterRecord, Shard
from megapar.parallel.weight_grad import LocalParameter, Piece, WeightGrads


@dataclass
class StageContext:
    """Given to every layer of a rank's stages when they are built.

    dtype: compute dtype; `wide_dtype` (at least fp32) is for losses, norms, tables and accumulation.
    tp_overlap: the configured engine; overlaps: that of every linear layer, by (stage, its weight's name).
    parameters: every parameter of this rank's stages in the order of construction.
    stage: the stage that is being built.
    placement: the pipeline rank of every stage.
    """

    mesh: Mesh
    dtype: torch.dtype = torch.float32
    sequence_parallel: bool = False
    tp_overlap: str = "auto"
    seed: int = 0
    placement: tuple[int, ...] = (0,)
    stage: int = 0
    weight_grads: WeightGrads = field(default_factory=WeightGrads)
    parameters: list[LocalParameter] = field(default_factory=list)
    overlaps: dict[tuple[int, str], Overlap] = field(default_factory=dict)
    _memory: SymmetricMemory | None = None

    @property
    def tp(self) -> Axis:
        return self.mesh["tp"]

    @property
    def ends(self) -> Axis | None:
        """The ranks of the first and the last stage, which hold copies of tied parameters; None if that is one rank."""
        return self.mesh["ends"] if self.placement[0] != self.placement[-1] else None

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

    def overlap(self, owner: LocalParameter) -> Overlap:
        """How the matmul of this parameter's layer meets its tensor-parallel peers."""
        made = Overlap(self.tp, self.tp_overlap, owner, self.weight_grads, self.shared_memory)
        self.overlaps[self.stage, owner.name] = made
        return made

    def shared_memory(self) -> SymmetricMemory:
        """What tensor-parallel peers share for the symmetric engine. The first call makes it and is collective."""
        if self._memory is None:
            assert self.tp.group is not None
            with sharing_memory():
                self._memory = SymmetricMemory(self.tp.group, self.device, self.mesh.timeout_s)
        return self._memory

    def check_peers(self) -> None:
        """Raise PeerTimeout if a kernel waited in vain for a peer: what it computed then must go nowhere."""
        if self._memory is not None:
            self._memory.check(finished=True)

    def close(self) -> None:
        """Give back the memory that peers share. Collective."""
        if self._memory is not None:
            self._memory.close()

    def engines(self) -> dict[str, dict[str, str]]:
        """What ran the matmuls of this rank that have a collective, by weight and direction."""
        return {name: made.ran for (_, name), made in self.overlaps.items() if made.ran}

    def local_tokens(self, tokens: int) -> slice:
        """This rank's share of `tokens` flattened tokens outside the tensor-parallel regions."""
        if not self.splits_tokens:
            return slice(0, tokens)
        share = tokens // self.tp.size
        return slice(self.tp.index * share, (self.tp.index + 1) * share)

    def parameter(self, module: nn.Module, attribute: str, *records: ParameterRecord) -> LocalParameter:
        """Declare `module.attribute`: this rank's shards of the records, stacked along dim 0.

        No memory is taken: the tensor is made when the rank's flat buffers are. A record whose tie is held here already
        is one more use of that parameter.
        """
        tied = [held for held in self.parameters if records[0].tie is not None and held.tie == records[0].tie]
        if tied:
            tied[0].uses += 1
            return tied[0]
        pieces: list[Piece] = []
        rows = 0
        for record in records:
            shard = record.shard(self.tp.size, self.tp.index)
            length = record.shard_shape(shard)[0]
            pieces.append(Piece(record, shard, rows, rows + length))
            rows += length
        shape = (rows, *records[0].shard_shape(pieces[0].shard)[1:])
        assert all(
            record.shard_shape(piece.shard)[1:] == shape[1:] for record, piece in zip(records, pieces, strict=True)
        )
        widest = sum(record.widest_shard(self.tp.size) for record in records)
        local = LocalParameter(module, attribute, shape, pieces, widest, self.stage)
        module.register_parameter(attribute, nn.Parameter(torch.empty(shape, device="meta")))
        self.parameters.append(local)
        return local

    def adopt(self, stage: nn.Module) -> None:
        """Take over the parameters of plain modules inside a stage: replicated, gradients from autograd.

        Their values are drawn anew by the module's own `reset_parameters`, seeded with its path; a module without one
        keeps what it was built with, which must then be the same on every rank. A parameter that several modules share
        stays one. A frozen one (requires_grad=False) and the modules' buffers stay as they are, in the compute dtype;
        they are not in checkpoints.
        """
        adopted: dict[int, LocalParameter] = {}
        known = {(id(parameter.module), parameter.attribute) for parameter in self.parameters}
        for path, module in stage.named_modules():
            plain = [
                name
                for name, tensor in module._parameters.items()
                if tensor is not None and (id(module), name) not in known
            ]
            reset = getattr(module, "reset_parameters", None)
            if plain and callable(reset):
                with self.seeded(path):
                    reset()
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device, self.dtype if buffer.is_floating_point() else None))
            for attribute in plain:
                tensor = getattr(module, attribute)
                if id(tensor) in adopted:
                    adopted[id(tensor)].aliases.append((module, attribute))
                    continue
                if not tensor.requires_grad:
                    tensor.data = tensor.data.to(self.device, self.dtype)
                    continue
                name = f"{path}.{attribute}" if path else attribute
                record = ParameterRecord(name, tuple(tensor.shape) or (1,), Given())
                shard = Shard(0, record.shape[0], self.tp.size, self.tp.index)
                piece = Piece(record, shard, 0, record.shape[0])
                local = LocalParameter(module, attribute, record.shape, [piece], record.numel, self.stage)
                local.values = tensor.detach().clone()
                adopted[id(tensor)] = local
                self.parameters.append(local)

    def seeded(self, name: str):
        """torch's generators fixed by (seed, name): a plain module built inside starts the same on every rank."""
        return _Seeded(self.seed, name)


class _Seeded:
    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        self.seed = int.from_bytes(digest, "little") >> 1
        self.fork = torch.random.fork_rng()

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        self.fork.__exit__(*error)  # type: ignore[arg-type]


def hook_plain_gradient(parameter: LocalParameter, weight_grads: WeightGrads) -> None:
    """Move what autograd leaves in `.grad` of a plain module's parameter to its main gradient."""

    def move(tensor: Tensor) -> None:
        assert tensor.grad is not None
        weight_grads.add(parameter, tensor.grad)
        tensor.grad = None

    parameter.tensor.register_post_accumulate_grad_hook(move)
