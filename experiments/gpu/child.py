"""The process of one section."""

import faulthandler
import os
import signal
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from experiments.gpu.run import Run
from experiments.gpu.section import read

HANGING_S = 3.0  # after its deadline a section that still runs says where


@dataclass(frozen=True)
class Task:
    """What a section's process is told. environment: variables to set, and with None to remove."""

    file: str
    out: Path
    log: Path
    seconds: float
    device: str
    seed: int
    versions: dict[str, str]
    environment: Mapping[str, str | None]


def child(task: Task, rows: Connection, parent: Connection) -> None:
    """Run one section, as the head of a session of its own. Exit code 0: it went through; 3: the device failed.

    parent: a pipe whose other end is the parent's, and ends with it.
    """
    os.setsid()
    with open(task.log, "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for name, value in task.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    faulthandler.dump_traceback_later(task.seconds + HANGING_S, file=2, exit=False)
    run = Run(task.file, task.out, task.seconds, task.device, task.seed, task.versions, rows.send)
    try:
        section = read(task.file).SECTION
        run.section = section.name
        section.run(run)
    except Exception as error:  # card-only
        traceback.print_exc()
        run.failed("section", error)


def end_with(parent: Connection) -> None:
    """Nothing is ever sent: what comes is the pipe's end."""
    parent.poll(None)
    os.killpg(0, signal.SIGTERM)  # card-only: the run was killed
