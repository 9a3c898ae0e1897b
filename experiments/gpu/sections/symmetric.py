"""The fused collectives on one GPU: ranks as streams of one process, late at random, hundreds of epochs, exact sums."""

import random
import time

import torch
from torch import Tensor

from experiments.gpu.one_process import FORMS, IN_TURN, OneProcess, begin, expected, operands_of
from experiments.gpu.run import Run
from experiments.gpu.section import Section
from megapar.kernels import use_backend
from megapar.kernels._common import check_overflow
from megapar.kernels.comm.symmetric import PeerTimeout
from megapar.kernels.matmul import PROCESSORS

SECONDS_EACH, EPOCHS = 1.5, 200  # of a form
POLLS = 2_000_000  # of a wait: two seconds
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}  # streams that share a queue would wait for each other


def symmetric(run: Run) -> None:
    use_backend(run.backend)
    if not run.cuda:
        check_overflow(False)
    forms = list(FORMS) if run.cuda else list(IN_TURN)
    for ranks, dtypes in ((2, (torch.float32, torch.bfloat16)), (4, (torch.bfloat16,))):
        run.attempt(f"{ranks} ranks", Ranks(run, ranks, forms).run_all, dtypes)


class Ranks:
    """R ranks in one process. blame: words after a check's name; with them a wrong epoch is counted and is no error."""

    def __init__(self, run: Run, ranks: int, forms: list[str], blame: str = "") -> None:
        self.run, self.ranks, self.forms, self.blame = run, ranks, forms, blame
        self.shape = (128, 64, 256) if run.cuda else (16, 16, 24)
        device, processors = torch.device(run.device), PROCESSORS["interpret"]
        if run.cuda:
            processors = torch.cuda.get_device_properties(0).multi_processor_count // ranks  # card-only
        self.shared: dict[object, list[Tensor]] = {}
        self.memories = [OneProcess(rank, ranks, device, self.shared, processors) for rank in range(ranks)]
        self.streams = [torch.cuda.Stream() if run.cuda else None for _ in range(ranks)]

    def run_all(self, dtypes: tuple[torch.dtype, ...]) -> None:
        self.prepare(dtypes)
        for dtype in dtypes:
            for form in self.forms:
                name = f"{form} {str(dtype)[6:]} R={self.ranks}{self.blame}"
                self.run.attempt(name, self.epochs, name, form, dtype)

    def prepare(self, dtypes: tuple[torch.dtype, ...]) -> None:
        """A module that is loaded, or memory that is made, would wait for a kernel that waits. So everything once with
        waits that give up, and then as if nothing had been."""
        for dtype in dtypes * 2:
            for form in self.forms:
                self.is_right(form, dtype, 0)
        for segments in self.shared.values():
            for own in segments:
                own.zero_()
        for memory in self.memories:
            memory.restart(POLLS)
        self.run.sync()

    def epochs(self, name: str, form: str, dtype: torch.dtype) -> None:
        wrong = done = 0
        most, end = EPOCHS if self.run.cuda else 2, time.monotonic() + SECONDS_EACH
        while done < most and self.run.left() > 0 and time.monotonic() < end:
            done += 1
            wrong += not self.is_right(form, dtype, done)
            self.check()
        count = f"wrong of {done} epochs"
        self.run.row(name, bool(self.blame) or (wrong == 0 < done), wrong, count, note="expected" * bool(self.blame))

    def check(self) -> None:
        """Raise PeerTimeout, if a rank waited in vain, and forget it."""
        try:
            for memory in self.memories:
                memory.check(finished=True)
        except PeerTimeout:  # card-only
            for memory in self.memories:
                memory.error.zero_()
            raise

    def is_right(self, form: str, dtype: torch.dtype, epoch: int) -> bool:
        """Run one epoch of all ranks, in a random order and late at random; whether all have the exact result."""
        every = operands_of(form, self.shape, epoch, self.ranks, dtype, self.run.device)
        wanted = [expected(form, every, rank) for rank in range(self.ranks)]
        self.run.sync()
        finish = {}
        for rank in random.sample(range(self.ranks), self.ranks):
            self.delay(rank)
            with torch.cuda.stream(self.streams[rank]):
                finish[rank] = begin(form, *every[rank], self.memories[rank])
        found = {}
        for rank, call in finish.items():
            with torch.cuda.stream(self.streams[rank]):
                found[rank] = call()
        self.run.sync()
        return all(torch.equal(found[rank].double(), wanted[rank]) for rank in range(self.ranks))

    def delay(self, rank: int) -> None:
        """Keep a rank's streams busy for up to 150 us, now and then."""
        for stream in (self.streams[rank], self.memories[rank]._side):
            if stream is not None and random.random() < 0.3:
                with torch.cuda.stream(stream):  # card-only
                    torch.cuda._sleep(random.randrange(1, 300_000))


SECTION = Section("symmetric", wave=5, seconds=60, run=symmetric, environment=ENVIRONMENT)
