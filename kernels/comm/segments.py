"""The memory of a channel, a segment on every rank: POSIX shared memory of processes, or that of GPUs."""

import os
from contextlib import suppress
from tempfile import mkstemp
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SHARED_FOLDER = "/dev/shm"


class NoSharedMemory(ValueError):
    """These ranks can't share memory. `str(error)` says on one line what they need."""


class Segments(Protocol):
    """One segment on every rank of a group. Making it is collective.

    own: this rank's, bytes, zeros at first; table: int64 [R], where this process sees each rank's, on the device.
    """

    own: Tensor
    table: Tensor

    def of(self, rank: int) -> Tensor:
        """That of a rank of the group, bytes, which the host can write to."""
        ...


class PosixSegments:
    """POSIX shared memory of processes on one host. Its files have no name any more once all have mapped them: from
    then on nothing is left behind, however a process ends."""

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        made: list[tuple[str, str]] = [("", "")] * dist.get_world_size(group)
        path, problem = _shared_file(size)
        try:
            dist.all_gather_object(made, (path, problem), group=group)
            self._refuse(made, group)
            segments = [torch.from_file(path, shared=True, size=size, dtype=torch.uint8) for path, _ in made]
            dist.barrier(group)
        finally:
            with suppress(OSError):
                os.unlink(path)
        self._mapped = segments
        self.own = segments[dist.get_rank(group)]
        self.table = torch.tensor([segment.data_ptr() for segment in segments], dtype=torch.int64)

    def of(self, rank: int) -> Tensor:
        return self._mapped[rank]

    @staticmethod
    def _refuse(made: list[tuple[str, str]], group: dist.ProcessGroup) -> None:
        """Raise NoSharedMemory, on every rank alike, unless all made their files on one host."""
        found: list[bool] = [False] * len(made)
        dist.all_gather_object(found, all(os.path.exists(path) for path, problem in made if not problem), group=group)
        problems = [problem for _, problem in made if problem]
        if problems or not all(found):
            reason = problems[0] if problems else "tensor-parallel ranks on one host"
            raise NoSharedMemory(f"parallel.tp_overlap=symmetric needs {reason}")


def _shared_file(size: int) -> tuple[str, str]:
    """(path of a new file in shared memory, "") or ("", what is needed for one)"""
    path = ""
    try:
        descriptor, path = mkstemp(prefix="megapar-", dir=SHARED_FOLDER)
        try:
            os.posix_fallocate(descriptor, 0, size)  # else the first write to a full file system would end the process
        finally:
            os.close(descriptor)
    except OSError as error:
        with suppress(OSError):
            os.unlink(path)
        return "", f"{size / 1e6:.1f} MB per rank in {SHARED_FOLDER}, which says: {error.strerror}; enlarge it"
    return path, ""


class TorchSegments:
    """Symmetric memory of torch: GPUs of one host that reach each other's memory."""

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        torch.cuda.synchronize(device)  # peers may still be in the memory that this replaces
        problem = ""
        try:
            self.own = symmetric.empty(size, dtype=torch.uint8, device=device).zero_()
            torch.cuda.synchronize(device)
            self._handle = symmetric.rendezvous(self.own, group)
        except RuntimeError as error:
            problem = (str(error).splitlines() or [type(error).__name__])[0]
        self._refuse(problem, group)
        self.table = torch.tensor(self._handle.buffer_ptrs, dtype=torch.int64, device=device)

    def of(self, rank: int) -> Tensor:
        buffer: Tensor = self._handle.get_buffer(rank, (self.own.numel(),), torch.uint8)
        return buffer

    @staticmethod
    def _refuse(problem: str, group: dist.ProcessGroup) -> None:
        """Raise NoSharedMemory, on every rank alike, unless all reached their peers' memory."""
        problems = [""] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
        for rank, said in zip(dist.get_process_group_ranks(group), problems, strict=True):
            if said:
                needs = "parallel.tp_overlap=symmetric needs GPUs of one host that reach each other's memory"
                raise NoSharedMemory(f"{needs}, and rank {rank} says: {said}; use parallel.tp_overlap=auto")
