"""Entries that stand in for training, for tests of launching: small, and failing on request."""

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megapar.config.errors import UserError
from megapar.console import console


def ok(config: Any, rank: int, world_size: int) -> None:
    """Sum the ranks over the process group and write what this rank saw into the run directory."""
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(rank))
    if world_size > 1:
        dist.all_reduce(total)
    print("noise of rank", rank)
    print("shown", world_size, file=console(), flush=True)
    seen = {"rank": rank, "world": world_size, "sum": total.item(), "hydra": "hydra" in sys.modules}
    seen |= {"threads": torch.get_num_threads(), "pid": os.getpid()}
    seen |= {"objects": len(gc.get_objects()), "spared": gc.get_freeze_count()}
    Path(config.run.dir, f"seen-{rank}.json").write_text(json.dumps(seen))


def raises(config: Any, rank: int, world_size: int) -> None:
    """Rank 1 fails by itself; the others wait for it in a collective."""
    import torch
    import torch.distributed as dist

    if rank == 1:
        raise ValueError("the culprit's own words")
    dist.all_reduce(torch.ones(1))


def killed(config: Any, rank: int, world_size: int) -> None:
    """The last rank is killed; the others wait for it in a collective."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    if rank == world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def mistake(config: Any, rank: int, world_size: int) -> None:
    """Rank 0 finds something that the user can mend."""
    import torch
    import torch.distributed as dist

    if rank == 0:
        raise UserError("tokens.bin: truncated at byte 12; make it again with `megapar data`")
    dist.all_reduce(torch.ones(1))


def alike(config: Any, rank: int, world_size: int) -> None:
    """All ranks find the same mistake."""
    import torch.distributed as dist

    dist.barrier()
    raise UserError("tokens.bin: truncated at byte 12; make it again with `megapar data`")


def mistake_of_1(config: Any, rank: int, world_size: int) -> None:
    """Rank 1 alone finds something that the user can mend."""
    import torch
    import torch.distributed as dist

    if rank == 1:
        raise UserError("tokens.bin: no such file on this machine")
    dist.all_reduce(torch.ones(1))


def sleeps(config: Any, rank: int, world_size: int) -> None:
    """Say where it is and then stay."""
    Path(config.run.dir, f"pid-{rank}").write_text(str(os.getpid()))
    time.sleep(120)


def busy(config: Any, rank: int, world_size: int) -> None:
    """Stay in a collective, outside Python, that never ends: rank 0 does not join."""
    import torch
    import torch.distributed as dist

    Path(config.run.dir, f"pid-{rank}").write_text(str(os.getpid()))
    if rank == 0:
        time.sleep(120)
    dist.all_reduce(torch.ones(1))


def lr_fails(config: Any, rank: int, world_size: int) -> None:
    """Count the starts of this point; fail where lr is 2 and the folder holds no file `fixed`."""
    if rank == 0:
        with open(Path(config.run.dir, "starts"), "a") as file:
            file.write("x")
        if config.optim.lr == 2.0 and not Path("fixed").exists():
            raise ValueError("lr of 2")
        evaluations = [{"val_loss": 9.0}, {"val_loss": config.optim.lr / 4}]
        summary = {"loss": config.optim.lr, "tokens_per_s": 1234.0, "evaluations": evaluations}
        rows(config, rank, world_size, steps=[config.train.steps])
        Path(config.run.dir, "summary.json").write_text(json.dumps(summary))


def rows(config: Any, rank: int, world_size: int, steps: Sequence[int] = (1, 2)) -> None:
    """Append two rows to the metrics and leave what else a run leaves."""
    folder = Path(config.run.dir)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)
    print("a line of the log", config.optim.lr)
    if world_size > 1:
        import torch.distributed as dist

        dist.barrier()  # as in any run: who is done first does not leave while another still connects to it


def rows_then_sleeps(config: Any, rank: int, world_size: int) -> None:
    """The same, and then stay."""
    rows(config, rank, world_size)
    sleeps(config, rank, world_size)


def write(config: Any, rank: int, world_size: int) -> None:
    """What `megapar generate` calls: show the prompt on the terminal."""
    if rank == 0:
        print(config.prompt, file=console(), flush=True)


def searches(config: Any, rank: int, world_size: int) -> None:
    """Make the run's schedule with no search to be had."""
    from megapar.config.stages import make_schedule
    from megapar.schedule.generators import auto

    auto.list_schedule = None  # type: ignore[assignment]
    print(len(make_schedule(config).rows), file=console(), flush=True)


def late(config: Any, rank: int, world_size: int) -> None:
    """Rank 1 fails, but its peers lose it and say so before it has said why."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    if rank == 1:
        dist.destroy_process_group()
        time.sleep(0.5)
        raise ValueError("the culprit's own words")
    dist.all_reduce(torch.ones(1))


def stops_behind_3(config: Any, rank: int, world_size: int) -> None:
    """Train, and have rank 0 ask for a stop in step 3, as the launcher does at Ctrl-C."""
    from unittest import mock

    from megapar.stop import stop_request
    from megapar.train.loop import run
    from megapar.train.trainer import Trainer

    plain = Trainer.step

    def step(self: Trainer, number: int, *rest: Any) -> Any:
        if number == 3 and rank == 0:
            assert stop_request().ask()
        return plain(self, number, *rest)

    with mock.patch.object(Trainer, "step", step):
        run(config, rank, world_size)


def listens_and_sleeps(config: Any, rank: int, world_size: int) -> None:
    """Say that a request to stop is heard, and then stay."""
    from megapar.stop import stop_request

    if rank == 0:
        stop_request().listen(True)
    sleeps(config, rank, world_size)
