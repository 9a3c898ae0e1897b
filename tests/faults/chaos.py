"""Chaos: a run that faults come to at random times, and what they cost.

    python -m tests.faults.chaos [--seconds 600] [--every 60] [--seed 1] [--out runs/chaos] [--write FILE]

From outside, at times by the seed, each kind as often as the others: a rank is killed or stopped, the launcher is
killed or asked to stop, a bit of the newest checkpoint flips before the launcher is killed. From inside, at steps by
the seed: a gradient that is not finite, which the run rolls back from, and a disk without room for a checkpoint. The
command is typed again when it has ended; ranks alone go on from copies in memory. In the end the run is asked to stop,
and compared with a run of as many steps that nothing happens to: figures of every step and the last state, to the bit.
That run takes about as long again.

It ends with 1 if anything is left behind, or a goal is missed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from megapar.checkpoint import find_checkpoint
from megapar.launch.machine import cpu_model
from megapar.launch.watch import read_board
from megapar.trace.board import Doing
from tests.cli.conftest import clean_environment
from tests.cli.test_cli_launch import alive
from tests.faults.runs import fault, final_state, hydra, trajectory
from tests.tiny import write_tokens

BEGIN, END = "<!-- chaos: begin, by make chaos -->", "<!-- chaos: end -->"
DAMAGE = "damage the checkpoint, kill the launcher"
KINDS = ("kill a rank", "stop a rank", "kill the launcher", "ask to stop", DAMAGE)
DEATHS = ("kill a rank",)  # which are to be said at once
INSIDE = {"nonfinite": "a gradient that is not finite", "disk_full": "a disk without room"}
GAP = 1000  # steps between two of a kind from inside, on average
GOALS = {"detection_s": 2.0, "recovery_s": 15.0, "goodput": 0.72}
FAILED = ("failed: ", "stuck: ", "interrupted")
LONG_S = 120.0  # without a step after a fault: the run is lost
MODEL = ["model.layers=4", "model.hidden=128", "model.heads=4", "model.vocab_size=61", "data.split=0.2"]
MODEL += [
    "train.seq_length=64",
    "train.global_batch_size=16",
    "train.micro_batch_size=4",
    "parallel=tp2pp2",
    "optim.lr=1e-3",
]
MODEL += ["checkpoint.every=10", "checkpoint.keep=3", "logger=disabled", "task.sample_tokens=0", "run.samples_every=1"]
SURVIVE = ["run.max_restarts=100000", "run.watchdog_s=5", "checkpoint.replicate=true", "checkpoint.replicate_every=5"]
SURVIVE += ["checkpoint.on_error=warn", "run.on_nonfinite=rollback", "run.nonfinite_limit=1"]
RANKS = 4


@dataclass
class Event:
    """A fault. Seconds from it: until somebody says so, until the run is back at the step that it was in."""

    kind: str
    at: float
    step: int
    detected: float | None = None
    recovered: float | None = None


@dataclass
class Chaos:
    """folder: of everything; run: the run directory in it"""

    folder: Path
    seed: int
    every: float
    events: list[Event] = field(default_factory=list)
    pids: set[int] = field(default_factory=set)
    process: "subprocess.Popen[str] | None" = None
    said: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.run = self.folder / "run"
        self.random = random.Random(self.seed)
        (self.folder / "tmp").mkdir(parents=True)
        self.words = [*MODEL, f"data.path={write_tokens(self.folder)}"]
        self.inside = [fault for kind in INSIDE for fault in self._plan(kind)]

    def _plan(self, kind: str) -> list[dict[str, Any]]:
        """Faults of a kind at random steps. Only a save's can be without room, and a save is every tenth step."""
        found, step = [], 0.0
        while step < 100 * GAP:
            step += self.random.expovariate(1 / GAP)
            phase, at = ("save", 10 * (int(step) // 10 + 1)) if kind == "disk_full" else ("opt", int(step) + 2)
            point = {"point": "tensor of a file"} if kind == "disk_full" else {}
            found.append(fault(self.random.randrange(RANKS), at, phase, kind, **point))
        return found

    def command(self, folder: Path, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "megapar.cli", "train", *self.words, f"run.dir={folder}", *overrides]

    def start(self) -> None:
        """Start the command, for the first time or again."""
        environment = clean_environment() | {"TMPDIR": str(self.folder / "tmp"), "OMP_NUM_THREADS": "1"}
        line = self.command(self.run, "train.steps=1000000", f"fault.plan={hydra(self.inside)}", *SURVIVE)
        self.process = subprocess.Popen(
            line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        for line in process.stderr:
            self.said.append((time.monotonic(), line.rstrip()))

    def ranks(self) -> list[Doing]:
        """What the ranks do; empty until all of them are in a step."""
        ranks = read_board(self.run)
        self.pids |= {one.pid for one in ranks if one.pid}
        return ranks if ranks and all(one.step for one in ranks) else []

    def step(self) -> int:
        """The step that all ranks have come to; 0 if they are in none."""
        return min((one.step for one in self.ranks()), default=0)

    def live(self, seconds: float) -> float:
        """Faults for so many seconds. Returns those that have passed until the run had stopped."""
        begin = time.monotonic()
        self.start()
        self._until(lambda: self.step() > 1, LONG_S)
        for at, kind in self._from_outside(seconds):
            time.sleep(max(0.0, begin + at - time.monotonic()))
            self.strike(kind)
        time.sleep(max(0.0, begin + seconds - time.monotonic()))
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(LONG_S)
        assert code == 85, f"exit code {code} where it was asked to stop: {self.said[-3:]}"
        return time.monotonic() - begin

    def _from_outside(self, seconds: float) -> list[tuple[float, str]]:
        """When, and what kind. One that is due before the run is back from the one before it waits for that."""
        count = int(seconds / self.every)
        times = sorted(self.random.uniform(0, seconds) for _ in range(count))
        kinds = [kind for _ in range(0, count, len(KINDS)) for kind in self.random.sample(KINDS, len(KINDS))]
        return list(zip(times, kinds, strict=False))

    def strike(self, kind: str) -> None:
        assert self.process is not None
        self._until(lambda: self.step() > 0, LONG_S)  # it may be on its way back from one from inside
        ranks = self.ranks()
        event = Event(kind, time.monotonic(), min(one.step for one in ranks))
        victim = self.random.choice(ranks).pid
        if kind == "stop a rank":
            os.kill(victim, signal.SIGSTOP)
        elif kind in ("kill the launcher", DAMAGE):
            if kind == DAMAGE:
                self._damage()
            self.process.kill()
            event.detected = 0.0
        elif kind == "ask to stop":
            self.process.send_signal(signal.SIGTERM)
        else:
            os.kill(victim, signal.SIGKILL)
        self.events.append(event)
        deadline = event.at + LONG_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                self._until(lambda: not any(map(alive, self.pids)), LONG_S)
                self.start()
            if event.detected is None:
                found = [at for at, line in self.said if at >= event.at and any(word in line for word in FAILED)]
                event.detected = found[0] - event.at if found else None
            if event.detected is not None and self.step() > event.step:
                event.recovered = time.monotonic() - event.at
                return
            time.sleep(0.02)
        raise SystemExit(f"{kind} in step {event.step}: no step within {LONG_S:.0f} s; {self.said[-5:]}")

    def _damage(self) -> None:
        """Flip a bit in a file of the newest checkpoint, if there are two: the one before it is gone on from."""
        folder = self.run / "checkpoints"
        if len(list(folder.glob("step-*[0-9]"))) < 2:
            return
        path = self.random.choice(sorted(find_checkpoint(folder).iterdir()))
        with open(path, "r+b") as file:
            at = self.random.randrange(path.stat().st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << self.random.randrange(8)]))

    def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise SystemExit(f"not so within {seconds:.0f} s; {self.said[-5:]}")
            time.sleep(0.02)


def leaks(chaos: Chaos, shared: set[str]) -> dict[str, int]:
    """Processes, names in shared memory and temporary files that are left, besides torch's own folder."""
    time.sleep(1.0)
    files = [path for path in (chaos.folder / "tmp").iterdir() if not path.name.startswith("torchinductor_")]
    return {
        "processes": sum(map(alive, chaos.pids)),
        "shared memory": len(set(os.listdir("/dev/shm")) - shared),
        "temporary files": len(files),
    }


def figures(chaos: Chaos, wall: float, left: dict[str, int]) -> dict[str, Any]:
    """goodput: the share of the time that the steps of the run would have taken by themselves."""
    rows = [json.loads(line) for line in (chaos.run / "metrics.jsonl").read_text().splitlines()]
    seconds = [row["step_time_s"] for row in rows if "loss" in row]
    lost = [event.recovered or 0.0 for event in chaos.events]
    seen = [event.detected or 0.0 for event in chaos.events if event.kind in DEATHS]
    struck = [path.name for path in (chaos.run / ".faults").iterdir()]
    return {
        "steps": len(seconds),
        "wall_s": wall,
        "goodput": len(seconds) * median(seconds) / wall,
        "faults": len(chaos.events) + len(struck),
        "inside": {kind: sum(f"-{kind}-" in name for name in struck) for kind in INSIDE},
        "lost_s": percentiles(lost),
        "detected_s": percentiles(seen),
        "goals_missed": missed(max(seen, default=0.0), percentiles(lost)[1], len(seconds) * median(seconds) / wall),
        "by_kind": {kind: [round(e.recovered or 0, 2) for e in chaos.events if e.kind == kind] for kind in KINDS},
        "left": left,
    }


def missed(detection_s: float, recovery_s: float, goodput: float) -> list[str]:
    """Goals that these figures miss, in words."""
    lines = []
    if detection_s > GOALS["detection_s"]:
        lines.append(f"a death was said after {detection_s:.1f} s, {GOALS['detection_s']:g} at most")
    if recovery_s > GOALS["recovery_s"]:
        lines.append(f"recovery took {recovery_s:.1f} s (p95), {GOALS['recovery_s']:g} at most")
    if goodput < GOALS["goodput"]:
        lines.append(f"goodput was {goodput:.0%}, {GOALS['goodput']:.0%} at least")
    return lines


def percentiles(values: list[float]) -> tuple[float, float]:
    """The 50th and the 95th."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    parts = quantiles(values, n=20, method="inclusive")
    return parts[9], parts[18]


def table(found: dict[str, Any], arguments: argparse.Namespace) -> str:
    left = ", ".join(f"{name} {count}" for name, count in found["left"].items())
    rows = [
        ("faults", f"{found['faults']} in {found['wall_s']:.0f} s, one every {arguments.every:.0f} s on average"),
        ("seconds lost per fault", "p50 {:.1f}, p95 {:.1f}".format(*found["lost_s"])),
        ("seconds until a death is said", "p50 {:.1f}, p95 {:.1f}".format(*found["detected_s"])),
        ("goodput", f"{found['goodput']:.0%}: {found['steps']} steps, by their median, of the time"),
        ("steps, figures, last state", "those of a run that nothing happened to, to the bit"),
        ("left behind", left),
    ]
    rows += [
        (kind, f"{len(lost)}: p50 {percentiles(lost)[0]:.1f} s lost") for kind, lost in found["by_kind"].items() if lost
    ]
    rows += [(INSIDE[kind], str(count)) for kind, count in found["inside"].items()]
    rows += [("goals", "; ".join(found["goals_missed"]) or "all reached")]
    lines = ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(
        [
            *lines,
            "",
            f"`make chaos`, seed {arguments.seed}, four ranks (tp2pp2) on {os.cpu_count()} cores of an {cpu_model()}.",
        ]
    )


def write(path: Path, text: str) -> None:
    """Put the table between its marks."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"{path} has no lines {BEGIN} and {END}"
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--every", type=float, default=60, help="seconds between faults, on average")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--write", type=Path, help="a Markdown file to write the table into")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.out, ignore_errors=True)
    shared = set(os.listdir("/dev/shm"))
    chaos = Chaos(arguments.out.resolve(), arguments.seed, arguments.every)
    wall = chaos.live(arguments.seconds)
    left = leaks(chaos, shared)
    steps = len(trajectory(chaos.run))
    clean = chaos.folder / "clean"
    # Of the same train.steps, which the learning rate depends on; it stops after the step that the run came to.
    plan = f"fault.plan=[{{rank: 0, step: {steps}, phase: opt, kind: ask}}]"
    done = subprocess.run(
        chaos.command(clean, "train.steps=1000000", plan), env=clean_environment() | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 85, done.returncode
    assert trajectory(chaos.run) == trajectory(clean), "the figures of some step differ from the clean run's"
    assert final_state(chaos.run) == final_state(clean), "the last state differs from the clean run's"
    found = figures(chaos, wall, left)
    (chaos.folder / "chaos.json").write_text(json.dumps(found, indent=2) + "\n")
    text = table(found, arguments)
    print(text)
    if arguments.write is not None:
        write(arguments.write, text)
    return 1 if any(left.values()) or found["goals_missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
