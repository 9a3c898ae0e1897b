"""Are copies equal that must be: what several ranks hold of a parameter, compared by digests of its bits.

Who holds the same follows from the records: the same name and the same box of it. So copies over data-parallel ranks,
parameters and heads that tensor parallelism doesn't divide, and tied weights of several stages are one comparison.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megapar.mesh import Mesh
from megapar.parallel.agreement import gather_texts
from megapar.parallel.buffers import Held, StageBuffers
from megapar.parallel.collectives import all_gather
from megapar.parallel.digest import digest


@dataclass(frozen=True)
class Unequal:
    """What has copies that differ. odd: the ranks outside the majority, or all, if there is none."""

    name: str
    ranks: list[int]
    odd: list[int]

    @classmethod
    def of(cls, name: str, copies: Mapping[int, Hashable]) -> "Unequal":
        """copies: by rank, or digests of them"""
        most, count = Counter(copies.values()).most_common(1)[0]
        return cls(
            name, list(copies), [rank for rank, copy in copies.items() if copy != most or 2 * count <= len(copies)]
        )

    @property
    def text(self) -> str:
        """`norm.weight on rank 1 differs from that on ranks 0, 2, 3`."""
        rest = [rank for rank in self.ranks if rank not in self.odd]
        if not rest:
            return f"{self.name} differs between {_ranks(self.ranks)}, with no majority"
        return f"{self.name} on {_ranks(self.odd)} differs from that on {_ranks(rest)}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def unequal_replicas(buffers: Sequence[StageBuffers], mesh: Mesh) -> list[Unequal]:
    """The parameters whose copies differ, by name. Collective, and the same on all ranks.

    Reads every parameter once; ranks send 16 bytes per piece that they hold.
    """
    mine = {_key(held): (held, held.view(part.params)) for part in buffers for held in part.held()}
    rows = torch.tensor([[key, 0] for key in mine], dtype=torch.int64, device=mesh.device).view(-1, 2)
    for row, (_, values) in zip(rows, mine.values(), strict=True):
        row[1] = digest(values)
    gathered = _gather(rows, mesh)
    everyones = torch.cat([torch.tensor([rank]).expand(len(part)) for rank, part in enumerate(gathered)])
    keys, digests = torch.cat(gathered).unbind(1)
    order = keys.argsort(stable=True)
    keys, digests, everyones = keys[order], digests[order], everyones[order]
    differ = keys[1:][(keys[1:] == keys[:-1]) & (digests[1:] != digests[:-1])].unique().tolist()
    if not differ:
        return []
    names = {key: mine[key][0].piece.record.name for key in differ if key in mine}
    said = gather_texts(json.dumps(list(names.items())), mesh["world"], mesh.device)
    name_of = {key: name for text in said for key, name in json.loads(text)}
    found = []
    for key in differ:
        of_ranks = dict(zip(everyones[keys == key].tolist(), digests[keys == key].tolist(), strict=True))
        found.append(Unequal.of(name_of[key], of_ranks))
    return sorted(found, key=lambda one: one.name)


def _key(held: Held) -> int:
    """int64: the same for copies."""
    record, box = held.piece.record, [(place.start, place.stop) for place in held.piece.shard.box]
    text = f"{record.name} {box}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _gather(rows: Tensor, mesh: Mesh) -> list[Tensor]:
    """Every rank's rows [n, 2], on the CPU, by rank."""
    world = mesh["world"]
    counts = all_gather(torch.tensor([len(rows)], dtype=torch.int64, device=mesh.device), world).tolist()
    padded = rows.new_zeros(1, max(counts), 2)
    padded[0, : len(rows)] = rows
    return [part[:count] for part, count in zip(all_gather(padded, world).cpu(), counts, strict=True)]
