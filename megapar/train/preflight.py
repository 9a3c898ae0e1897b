"""Is every rank fit for a run: does it multiply rightly, has it memory and room on disk, does it hear every other rank.

What ranks find travels over the store that they met at, and not over the links that are tested; rank 0 judges.
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megapar.config.errors import UserError
from megapar.mesh import Mesh
from megapar.part import DTYPES
from megapar.torch_compat import default_store
from megapar.train.trainer import Trainer

LINKS_S = 4.0  # for a message of every other rank to arrive
ANSWER_S = 6.0  # for a rank to begin, and for it to say what it has found
LEAST_MEMORY = 1 << 28  # bytes that must be free
MOST_CLOCK_OFFSET_S = 10.0
SIZE, INNER, TIMES = 256, 64, 8  # of products [SIZE, INNER] @ [INNER, SIZE]
WORDS = 128  # of a message
MIB = 1 << 20


@dataclass(frozen=True)
class Report:
    """What a rank found. problem: in its arithmetic or memory; unheard: ranks whose message did not come; garbled:
    those whose message was another one; clock: seconds since 1970; memory, disk: bytes free, None: not known; state:
    bytes of a checkpoint that are this rank's."""

    problem: str | None
    clock: float
    memory: int | None
    disk: int
    state: int
    unheard: list[int] = field(default_factory=list)
    garbled: list[int] = field(default_factory=list)


def preflight(trainer: Trainer, folder: Path) -> str:
    """A line about ranks that are fit, on rank 0. Collective; takes at most about 10 seconds.

    folder: where checkpoints will be. Raises UserError, on all ranks alike, that names the first that are not fit.
    """
    mesh = trainer.mesh
    store = _Answers(mesh)
    absent = store.absent("here", time.time())
    if absent:
        raise UserError(_verdict(f"{_ranks(absent)} did not answer within {ANSWER_S:g} s"))
    clock = time.time()
    unheard, garbled = links(mesh) if mesh.world_size > 1 else ([], [])
    memory, state = free_memory(mesh.device), _state_bytes(trainer)
    problem = wrong_product(mesh.device, trainer.config.train.dtype)
    if problem is None and memory is not None and memory < LEAST_MEMORY:
        problem = f"has {memory // MIB} MiB of free memory; a run needs at least {LEAST_MEMORY // MIB}"
    mine = Report(problem, clock, memory, shutil.disk_usage(folder).free, state, unheard, garbled)
    reports = {rank: Report(**found) for rank, found in store.gather("found", asdict(mine)).items()}
    if problem := first_problem(reports, mesh.world_size):
        raise UserError(_verdict(problem))
    return _summary(reports, folder)


def first_problem(reports: Mapping[int, Report], ranks: int) -> str | None:
    """The first of what is wrong with ranks, by their reports."""
    if missing := [rank for rank in range(ranks) if rank not in reports]:
        return f"{_ranks(missing)} did not say within {ANSWER_S:g} s what it found"
    for rank, report in reports.items():
        if report.problem is not None:
            return f"rank {rank} {report.problem}"
    for rank, report in reports.items():
        if report.garbled:
            return f"a message from rank {report.garbled[0]} arrived changed at rank {rank}"
    if silent := [(peer, rank) for rank, report in reports.items() for peer in report.unheard]:
        pairs = ", ".join(f"from rank {peer} to rank {rank}" for peer, rank in silent[:3])
        more = f" and {len(silent) - 3} more" if len(silent) > 3 else ""
        return f"no message within {LINKS_S:g} s {pairs}{more}"
    need = sum(report.state for report in reports.values())
    for rank, report in reports.items():
        if abs(offset := report.clock - reports[0].clock) > MOST_CLOCK_OFFSET_S:
            return f"rank {rank}'s clock is {abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} rank 0's"
        if report.disk < need:
            room = f"{report.disk / MIB:.0f} MiB in the run's directory"
            return f"rank {rank} has {room}, and a checkpoint takes about {need / MIB:.0f} MiB"
    return None


def wrong_product(device: torch.device, dtype: str) -> str | None:
    """What is wrong with products of whole numbers, which every dtype holds exactly; None if nothing is."""
    grid = torch.arange(SIZE * INNER)
    a, b = (grid * 7 + grid // 5) % 3 - 1, (grid * 11 + grid // 3) % 3 - 1
    a, b = a.view(SIZE, INNER), b.view(INNER, SIZE)
    right = (a.numpy() @ b.numpy()).tolist()
    for name in dict.fromkeys(("fp32", "fp64", dtype)):
        left, other = a.to(device, DTYPES[name]), b.to(device, DTYPES[name])
        expected = torch.tensor(right, dtype=DTYPES[name], device=device)
        wrong = sum(int((left @ other != expected).sum()) for _ in range(TIMES))
        if wrong:
            return (
                f"multiplies wrongly: {wrong} of {TIMES * SIZE * SIZE} elements of products of whole numbers in {name}"
            )
    return None


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device's; None where that can't be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def links(mesh: Mesh) -> tuple[list[int], list[int]]:
    """Ranks whose message to this one did not come in time, and those whose message was not what they sent.

    Over the hosts' group, which on a CPU is the one that everything goes over; NCCL's groups were used when they were
    made. All messages are on their way at once, so that one that does not come delays no other.
    """
    peers = [rank for rank in range(mesh.world_size) if rank != mesh.rank]
    arrived = {peer: torch.zeros(WORDS, dtype=torch.int64) for peer in peers}
    receives = {peer: dist.irecv(arrived[peer], peer, group=mesh.hosts) for peer in peers}
    sends = [dist.isend(_message(mesh.rank, peer), peer, group=mesh.hosts) for peer in peers]
    deadline, unheard = time.monotonic() + LINKS_S, []
    for peer, receive in receives.items():
        assert receive is not None
        try:
            receive.wait(timedelta(seconds=max(0.01, deadline - time.monotonic())))
        except RuntimeError:
            unheard.append(peer)
    if not unheard:
        for send in sends:
            assert send is not None
            send.wait()
    garbled = [peer for peer in peers if peer not in unheard and not arrived[peer].equal(_message(peer, mesh.rank))]
    return unheard, garbled


def _message(source: int, target: int) -> torch.Tensor:
    return torch.arange(WORDS) + (source << 40) + (target << 16)


class _Answers:
    """What ranks say over the store."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.store = default_store() if mesh.world_size > 1 else None

    def absent(self, topic: str, value: Any) -> list[int]:
        """Ranks that have not spoken of a topic by the time that rank 0 waits: the same on all."""
        said = self.gather(topic, value)
        return [rank for rank in range(self.mesh.world_size) if rank not in said]

    def gather(self, topic: str, value: Any) -> dict[int, Any]:
        """What every rank says, by rank, without those that say nothing in time. Rank 0 collects it for all."""
        store = self.store
        if store is None:
            return {0: value}
        keys = [f"preflight/{topic}/{rank}" for rank in range(self.mesh.world_size)]
        store.set(keys[self.mesh.rank], json.dumps(value))
        whole = f"preflight/{topic}/all"
        if self.mesh.rank == 0:
            deadline, found = time.monotonic() + ANSWER_S, {}
            for rank, key in enumerate(keys):
                if _came(store, key, deadline - time.monotonic()):
                    found[rank] = json.loads(store.get(key))
            store.set(whole, json.dumps(found))
        if not _came(store, whole, 2 * ANSWER_S):
            raise UserError(_verdict(f"rank 0 did not answer within {2 * ANSWER_S:g} s"))
        return {int(rank): found for rank, found in json.loads(store.get(whole)).items()}


def _came(store: dist.Store, key: str, seconds: float) -> bool:
    """Whether somebody has set a key within this time."""
    try:
        store.wait([key], timedelta(seconds=max(0.01, seconds)))
    except RuntimeError:  # torch has an error of its own for a time-out, which is one of these
        return False
    return True


def _state_bytes(trainer: Trainer) -> int:
    """Of a checkpoint's tensors this rank's, so that the sum over ranks is about what it takes."""
    own = [tensor for tensors in trainer.optimizer.tensors().values() for tensor in tensors]
    copies = 1 if trainer.buffers.zero else trainer.mesh.data.size
    return sum(tensor.numel() * tensor.element_size() for tensor in own) // copies


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _verdict(problem: str) -> str:
    return f"run.preflight=true: {problem}; mend or leave out that machine, or start without the check"


def _summary(reports: Mapping[int, Report], folder: Path) -> str:
    known = [report.memory for report in reports.values() if report.memory is not None]
    memory = f", at least {min(known) / 2**30:.1f} GiB of memory free" if known else ""
    offsets = [report.clock - reports[0].clock for report in reports.values()]
    clocks = f", clocks within {max(offsets) - min(offsets):.2f} s" if len(reports) > 1 else ""
    count = f"{len(reports)} rank{'s' if len(reports) > 1 else ''}"
    need, room = sum(report.state for report in reports.values()), min(report.disk for report in reports.values())
    disk = f"{room / 2**30:.1f} GiB of disk for checkpoints of {need / MIB:.1f} MiB"
    return f"preflight   {count} multiply rightly and hear each other{memory}{clocks}, {disk}"
