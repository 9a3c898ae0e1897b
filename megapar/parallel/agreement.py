"""What ranks must agree on outside the hot path: short texts, and whether something failed anywhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from megapar.config.errors import UserError
from megapar.mesh import Axis, Mesh
from megapar.parallel.collectives import all_gather


def gather_texts(text: str, axis: Axis, device: torch.device) -> list[str]:
    """Every rank's text, by rank. Collective over the axis; travels as bytes on `device`, not by pickle."""
    if axis.size == 1:
        return [text]
    data = text.encode()
    lengths = all_gather(torch.tensor([len(data)], dtype=torch.int64, device=device), axis).tolist()
    padded = torch.zeros(max(1, *lengths), dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else padded[:0]
    rows: Tensor = all_gather(padded.to(device).unsqueeze(0), axis).cpu()
    return [row[:length].numpy().tobytes().decode() for row, length in zip(rows, lengths, strict=True)]


def broadcast_text(text: str | None, axis: Axis, device: torch.device) -> str | None:
    """The text of the axis's first rank, on every rank; None for none. Collective over the axis."""
    if axis.size == 1:
        return text
    data = b"" if text is None else text.encode()
    size = torch.tensor([-1 if text is None else len(data)], dtype=torch.int64, device=device)
    dist.broadcast(size, axis.ranks[0], group=axis.group)
    if int(size) < 0:
        return None
    content = torch.zeros(int(size), dtype=torch.uint8)
    if axis.index == 0 and data:
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    content = content.to(device)
    if int(size):
        dist.broadcast(content, axis.ranks[0], group=axis.group)
    return content.cpu().numpy().tobytes().decode()


def first_says(yes: bool, axis: Axis, device: torch.device) -> bool:
    """What the axis's first rank says. Collective over the axis."""
    if axis.size == 1:
        return yes
    said = torch.tensor([int(yes)], dtype=torch.int32, device=device)
    dist.broadcast(said, axis.ranks[0], group=axis.group)
    return bool(said)


def all_say(yes: bool, mesh: Mesh) -> bool:
    """Whether every rank says so. Collective over all ranks, between hosts: a GPU is not asked."""
    if mesh.world_size == 1:
        return yes
    said = torch.tensor([int(yes)], dtype=torch.int32)
    dist.all_reduce(said, dist.ReduceOp.MIN, group=mesh.hosts)
    return bool(said)


@contextmanager
def all_or_none(axis: Axis, device: torch.device) -> Iterator[None]:
    """Collective: where what runs inside raises a UserError on any rank, every rank raises that of the first one.

    What runs inside must hold no collective: a rank that failed would not take part.
    """
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    problems = [text for text in gather_texts(problem, axis, device) if text]
    if problems:
        raise UserError(problems[0])
