"""Sections as processes: side by side, each with a deadline, and nothing of them left when they are over."""

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from experiments.gpu.child import Task, child
from experiments.gpu.section import Section
from experiments.gpu.table import Row, row_of, skipped

GRACE_S = 5.0  # that a section gets beyond its own seconds before it is killed
PATIENCE_S = 2.0  # from being asked to end to being made to
REHEARSED = 4  # times its seconds that a section gets in a rehearsal
LEAST_S = 10.0  # with less than this a section is not begun
MARK = "MEGAPAR_ACCEPTANCE"  # in the environment of all that a section starts: whose it is
INTERPRET = "TRITON_INTERPRET"
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    """What all sections of a run have in common."""

    out: Path
    device: str
    seed: int
    versions: dict[str, str]
    width: int  # sections at a time

    @property
    def kind(self) -> str:
        return "measured" if self.device == "cuda" else "rehearsed"

    def allowed(self, section: Section) -> float:
        """Its seconds. In a rehearsal, on whatever machine beside whatever else, they only catch a hang."""
        return section.seconds * (1 if self.device == "cuda" else REHEARSED)

    def share(self, section: Section, waiting: int, left: float) -> float:
        """Its seconds, or those that it may have where the wave has so many seconds left for so many sections that have
        not begun, this one too. In a rehearsal what is left is for whoever comes."""
        rounds = math.ceil(waiting / self.width) if self.device == "cuda" else 1
        return min(self.allowed(section), left / rounds - GRACE_S)

    def context(self, section: Section) -> BaseContext:
        """Sections are forked from a process that has imported what they need, but has no CUDA context. Its kernels are
        interpreted in a rehearsal, so who compiles them there has to begin anew."""
        forked = section.interpret or self.device == "cuda"
        return multiprocessing.get_context("forkserver" if forked else "spawn")


def start_server(device: str) -> None:
    """Let the fork server begin with its imports. In a rehearsal sections share cores, and their tensors are small."""
    os.environ.pop(INTERPRET, None)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # what is imported may ask for GPUs, and must make no context
    if device == "cpu":
        os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", INTERPRET: "1"}
    # The server has no sys.path of ours, and would look into the current folder first, which may be another checkout.
    os.environ |= {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    multiprocessing.get_context("forkserver").set_forkserver_preload(["experiments.gpu.preload"])
    forkserver.ensure_running()


class Child:
    """A section's process. Its rows come over a pipe, all else it says goes to a log. It can't outlive this process."""

    def __init__(self, file: str, section: Section, seconds: float, plan: Plan) -> None:
        self.section, self.begun, self.limit = section, time.monotonic(), time.monotonic() + seconds + GRACE_S
        self.cut_short = seconds < plan.allowed(section)
        self.log = plan.out / "logs" / f"{section.name}.txt"
        environment = {**section.environment, MARK: mark_of(section)}
        removed = {} if section.interpret else {INTERPRET: None}
        task = Task(
            file, plan.out, self.log, seconds, plan.device, plan.seed, plan.versions, {**environment, **removed}
        )
        context = plan.context(section)
        self.pipe, rows = context.Pipe(duplex=False)
        end, self.alive = context.Pipe(duplex=False)
        self.process: BaseProcess = context.Process(target=child, args=(task, rows, end))  # type: ignore[attr-defined]
        self.process.start()
        rows.close()
        end.close()

    def rows(self) -> list[Row]:
        """Those that came since the last call."""
        found: list[Row] = []
        with suppress(EOFError, OSError):
            while self.pipe.poll():
                found.append(self.pipe.recv())
        return found

    def is_over(self) -> bool:
        return not self.process.is_alive() or time.monotonic() > self.limit

    def end(self, plan: Plan) -> list[Row]:
        """End what is left of it; its last rows, and one that says how it ended where that was not as it should."""
        late = self.process.is_alive()
        self.kill()
        rows, code, seconds = self.rows(), self.process.exitcode, time.monotonic() - self.begun
        name, same = self.section.name, {"device": plan.device, "versions": plan.versions}
        if late and self.cut_short:  # card-only
            reason = f"its share of the run's seconds was over after {seconds:.0f} of its own"  # card-only
            rows.append(skipped(name, "section", reason, **same))
        elif late or code not in (0, 3):  # card-only
            note = f"killed after {seconds:.0f} s" if late else f"ended with {code}"
            rows.append(row_of(name, "section", False, plan.kind, note=f"{note}; see {self.log}", **same))
        return rows

    def kill(self) -> None:
        """End its session: first asked to, so that multiprocessing can give back its semaphores."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            last = time.monotonic() + PATIENCE_S  # card-only
            while time.monotonic() < last:  # card-only: something is left, as by a crash
                os.killpg(self.process.pid, 0)
                time.sleep(0.01)
            os.killpg(self.process.pid, signal.SIGKILL)  # card-only
        self.process.join(PATIENCE_S)
        self.alive.close()
        end_strays(self.section)


def run_waves(
    waves: Sequence[Sequence[tuple[str, Section]]], plan: Plan, end: float, add: Callable[[Row], None]
) -> dict[str, float]:
    """Run waves of sections, one after another, and add their rows as they come; the seconds that each section took.

    end: by time.monotonic(); by then the last is over or killed
    """
    seconds: dict[str, float] = {}
    for at, wave in enumerate(waves):
        asked = [[plan.allowed(section) for _, section in one] for one in waves[at:]]
        now = time.monotonic()
        seconds |= run_wave(wave, plan, now + seconds_of_wave(asked, plan.width, end - now), add)
    return seconds


def seconds_of_wave(waves: Sequence[Sequence[float]], width: int, left: float) -> float:
    """What the first of these waves may take of the seconds that are left: a share by what each of them asks for. What
    it doesn't use is for those behind it.

    waves: deadlines of their sections, of which `width` run at a time
    """
    asked = [math.ceil(len(wave) / width) * (max(wave) + GRACE_S) for wave in waves]
    return left * asked[0] / sum(asked)


def run_wave(
    sections: Iterable[tuple[str, Section]], plan: Plan, end: float, add: Callable[[Row], None]
) -> dict[str, float]:
    """The same of one wave, `width` sections at a time."""
    waiting, running, seconds = list(sections), list[Child](), dict[str, float]()
    try:
        while waiting or running:
            while len(running) < plan.width and (one := ready(waiting, running)):
                file, section = one
                left = plan.share(section, len(waiting), end - time.monotonic())
                waiting.remove(one)
                if left >= min(LEAST_S, section.seconds):
                    running.append(Child(file, section, left, plan))
                else:
                    same = {"device": plan.device, "versions": plan.versions}  # card-only
                    add(skipped(section.name, "section", "no time left", **same))  # card-only
            for child in list(running):
                over = child.is_over()
                for row in child.rows() + (child.end(plan) if over else []):
                    add(row)
                if over:
                    running.remove(child)
                    seconds[child.section.name] = time.monotonic() - child.begun
            time.sleep(0.02)
    finally:
        for child in running:  # card-only: the run was interrupted
            child.kill()
    return seconds


def ready(waiting: list[tuple[str, Section]], running: list[Child]) -> tuple[str, Section] | None:
    """The first of those that wait for no other one."""
    open_ones = {section.name for _, section in waiting} | {child.section.name for child in running}
    return next((one for one in waiting if not open_ones & {*one[1].needs}), None)


def mark_of(section: Section) -> str:
    return f"{os.getpid()}/{section.name}"


def end_strays(section: Section) -> None:
    """End what an ended section has started in sessions of their own, as torch.compile does its workers."""
    mark = f"{MARK}={mark_of(section)}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)  # card-only: torch.compile runs there
