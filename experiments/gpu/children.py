"""Sections as processes: side by side, each with a deadline, and nothing of them left when they are over."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from experiments.gpu.rows import Row, row_of, skipped
from experiments.gpu.section import Section

GRACE_S = 12.0  # that a section gets beyond its own seconds before it is killed
LEAST_S = 10.0  # with less than this a section is not begun
MARK = "MEGAPAR_ACCEPTANCE"  # in the environment of all that a section starts: whose it is
SCRIPT = Path(__file__).with_name("accept.py")


@dataclass(frozen=True)
class Plan:
    """What all sections of a run have in common."""

    out: Path
    device: str
    seed: int
    versions: dict[str, str]
    end: float  # of the whole run, by time.monotonic()
    width: int  # sections at a time

    def environment(self, section: Section) -> dict[str, str]:
        found = os.environ | section.environment | {"PYTHONUNBUFFERED": "1", MARK: mark_of(section)}
        found.pop("TRITON_INTERPRET", None)
        if self.device == "cpu":  # sections share cores, and their tensors are small
            found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            found |= {"TRITON_INTERPRET": "1"} if section.interpret else {}
        return found


class Child:
    """A section's process, the head of a session of its own. Its rows come over a pipe, all else it says in a log.

    It ends with its standard input, so that it can't outlive the process that holds the other end.
    """

    def __init__(self, file: str, section: Section, seconds: float, plan: Plan) -> None:
        self.section, self.begun, self.limit = section, time.monotonic(), time.monotonic() + seconds + GRACE_S
        self.cut_short = seconds < section.seconds
        given = {
            "file": file, "out": str(plan.out), "seconds": seconds, "device": plan.device, "seed": plan.seed,
            "versions": plan.versions,
        }  # fmt: skip
        self.pipe, write = os.pipe()
        os.set_blocking(self.pipe, False)
        self.log = plan.out / "logs" / f"{section.name}.txt"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--child", json.dumps(given | {"pipe": write})],
                env=plan.environment(section), start_new_session=True, pass_fds=[write],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        os.close(write)
        self.rest = b""

    def rows(self) -> list[Row]:
        """Those that came since the last call."""
        with suppress(BlockingIOError):
            while got := os.read(self.pipe, 1 << 16):
                self.rest += got
        *lines, self.rest = self.rest.split(b"\n")
        return [json.loads(line) for line in lines]

    def is_over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() > self.limit

    def end(self, plan: Plan) -> list[Row]:
        """End what is left of it; its last rows, and one that says how it ended where that was not as it should."""
        late = self.process.poll() is None
        end_group(self.process)
        end_strays(self.section)
        rows, code, seconds = self.rows(), self.process.wait(), time.monotonic() - self.begun
        os.close(self.pipe)
        name, same = self.section.name, {"device": plan.device, "versions": plan.versions}
        if late and self.cut_short:  # card-only
            rows.append(skipped(name, "section", f"the run's seconds were over after {seconds:.0f} of its own", **same))
        elif late or code not in (0, 3):
            note = f"killed after {seconds:.0f} s" if late else f"ended with {code}"
            kind = "measured" if plan.device == "cuda" else "rehearsed"
            rows.append(row_of(name, "section", False, kind, note=f"{note}; see {self.log}", **same))
        return rows


def run_wave(sections: Iterable[tuple[str, Section]], plan: Plan, add: Callable[[Row], None]) -> dict[str, float]:
    """Run sections, `width` at a time, and add their rows as they come; the seconds that each took."""
    waiting, running, seconds = list(sections), list[Child](), dict[str, float]()
    try:
        while waiting or running:
            while waiting and len(running) < plan.width:
                file, section = waiting.pop(0)
                left = min(section.seconds, plan.end - time.monotonic())
                if left >= LEAST_S:
                    running.append(Child(file, section, left, plan))
                else:
                    add(skipped(section.name, "section", "no time left", device=plan.device, versions=plan.versions))
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
            end_group(child.process)
            end_strays(child.section)
    return seconds


def end_group(process: subprocess.Popen[bytes], patience_s: float = 2.0) -> None:
    """End a process and its session: first asked to, so that multiprocessing can give back its semaphores."""
    assert process.stdin is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        last = time.monotonic() + patience_s
        while time.monotonic() < last:
            process.poll()
            os.killpg(process.pid, 0)
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.wait()


def mark_of(section: Section) -> str:
    return f"{os.getpid()}/{section.name}"


def end_strays(section: Section) -> None:
    """End what an ended section has started in sessions of their own, as torch.compile does its workers."""
    mark = f"{MARK}={mark_of(section)}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)  # card-only: torch.compile runs there
