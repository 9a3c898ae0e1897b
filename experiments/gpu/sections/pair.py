"""Two processes that share the device: rendezvous, addresses of the peer, every form, and giving memory back."""

import multiprocessing
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments.gpu.one_process import FORMS, expected, operands_of
from experiments.gpu.run import Run, last_line
from experiments.gpu.section import Section
from megapar.kernels import use_backend
from megapar.kernels._common import check_overflow
from megapar.kernels.comm import segments
from megapar.kernels.comm.symmetric import SymmetricMemory

RANKS = 2
WAIT_S = 20.0  # of one rank for the other


def pair(run: Run) -> None:
    context: Any = multiprocessing.get_context("spawn" if run.cuda else "fork")  # a CUDA context can't be forked
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    arguments = str(run.out / "work"), run.device
    ranks = [context.Process(target=pair_rank, args=(rank, *arguments, pipes[rank][1])) for rank in range(RANKS)]
    for process, (_, sends) in zip(ranks, pipes, strict=True):
        process.start()
        sends.close()
    readers: list[Connection] = [reads for reads, _ in pipes]
    failed = set[str]()
    right: dict[str, list[bool]] = {}
    while readers and run.left() > 0:
        ready = wait(readers, timeout=run.left())
        for reads in [one for one in readers if one in ready]:
            try:
                form, said = reads.recv()
            except EOFError:
                readers.remove(reads)
                continue
            if form:
                right.setdefault(form, []).append(said)
            else:
                failed.add(said)  # card-only
    for form, told in right.items():
        run.row(form, all(told), sum(told), f"right of {len(told)} epochs of both ranks")
    for process in ranks:
        process.join(max(1.0, min(5.0, run.left())))
    codes = [process.exitcode for process in ranks]
    ended = codes == [0] * RANKS and set(right) == set(FORMS)
    run.row("both ranks end", ended, note=" ".join([f"exit codes {codes}", *failed]))


def pair_rank(rank: int, work: str, device: str, sends: Connection) -> None:
    """Send (form, whether an epoch was right), or ("", what it raised)."""
    try:
        forms_of_rank(rank, Path(work), device, sends)
    except Exception as error:  # card-only
        sends.send(("", f"rank {rank}: {last_line(error)}"))
        time.sleep(0.5)  # until the other rank sees it too, before a store without its owner does
        raise SystemExit(1) from None


def forms_of_rank(rank: int, work: Path, device: str, sends: Connection) -> None:
    cuda = device == "cuda"
    torch.set_num_threads(1)
    use_backend("triton" if cuda else "interpret")
    dist.init_process_group("gloo", init_method=f"file://{work}/pair.store", rank=rank, world_size=RANKS)
    if not cuda:
        check_overflow(False)
        segments.SHARED_FOLDER = str(work)  # where nothing stays, however this ends
    group = dist.group.WORLD
    assert group is not None
    memory = SymmetricMemory(group, torch.device("cuda", 0) if cuda else torch.device("cpu"), WAIT_S)
    shape, last = ((64, 32, 64), 5) if cuda else ((16, 16, 16), 2)
    for form in FORMS:
        for epoch in range(1, last + 1):
            every = operands_of(form, shape, epoch, RANKS, torch.float32, device)
            found = FORMS[form](*every[rank], memory)
            memory.check(finished=True)
            sends.send((form, torch.equal(found.double(), expected(form, every, rank))))
    memory.close()
    dist.barrier()
    dist.destroy_process_group()


SECTION = Section("pair", wave=6, seconds=40, run=pair, environment={"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"})
