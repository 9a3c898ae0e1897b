"""The command line of the acceptance: which sections, in which order, and what comes out."""

import argparse
import fcntl
import importlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from experiments.gpu.children import ROOT, Plan, run_waves, start_server
from experiments.gpu.run import missing_package
from experiments.gpu.section import Section, find
from experiments.gpu.table import RowFile, row_of, skipped, summary

SECONDS = 470.0
WORK, LOGS = "work", "logs"  # folders of DIR: what sections leave for each other; what they print
LOCK = ".lock"  # of DIR, held by the run that writes there


def main() -> int:
    """Exit code 0: every number is right; 1: one is wrong; 2: the command is."""
    parser = argparse.ArgumentParser(prog="accept.py", description="Acceptance of megapar on one GPU.")
    parser.add_argument("--out", help="the folder for accept.json")
    parser.add_argument("--seconds", type=_seconds, default=SECONDS, help=f"of the whole run; default: {SECONDS:g}")
    parser.add_argument("--only", default="", help="sections, with commas between them; default: all")
    parser.add_argument("--device", default="", choices=("", "cuda", "cpu"), help="default: cuda where there is one")
    parser.add_argument("--seed", type=int, default=None, help="of the random inputs; default: a new one")
    args = parser.parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: torch finds no GPU here; use --device cpu")  # card-only
    start_server(device)
    sections, broken = find()
    chosen = [name for name in args.only.split(",") if name] or [*sections, *broken]
    unknown = [name for name in chosen if name not in sections and name not in broken]
    if unknown:  # card-only
        return refuse(f"--only {','.join(unknown)}: no such section; there are {', '.join([*sections, *broken])}")
    if not args.out:
        return refuse("--out DIR: say which folder accept.json goes to")  # card-only
    out = Path(args.out).resolve()
    try:
        lock = locked(out)
        prepare(out)
    except BlockingIOError:  # card-only
        return refuse(f"--out {args.out}: another run writes there; wait for its end, or choose another folder")
    except OSError as error:
        return refuse(f"--out {args.out}: {error.strerror or error}; choose another folder")  # card-only
    signal.signal(signal.SIGTERM, interrupted)
    with lock:
        return run_all(args, out, device, chosen, sections, broken)


def run_all(
    args: argparse.Namespace, out: Path, device: str, chosen: list[str],
    sections: dict[str, tuple[str, Section]], broken: dict[str, Exception],
) -> int:  # fmt: skip
    begun, seed = time.monotonic(), args.seed
    seed = int.from_bytes(os.urandom(3), "little") if seed is None else seed
    file, found = RowFile(out / "accept.json"), versions()
    same: dict[str, Any] = {"device": device, "versions": found}
    width = max(2, min(6, (os.cpu_count() or 2) // 2))
    plan = Plan(out, device, seed, found, width)
    file.add(row_of("accept", "seed", True, plan.kind, value=seed, note=" ".join(sys.argv[1:]), **same))
    for name in chosen:
        if name in broken:  # card-only: a name that moved, or a package that isn't there
            reason = missing_package(broken[name])
            wrong = row_of(name, "section", False, plan.kind, note=f"can't be read: {broken[name]}", **same)
            file.add(skipped(name, "section", reason, **same) if reason else wrong)
    mine = [sections[name] for name in sections if name in with_needs(chosen, sections)]
    seconds: dict[str, float] = {}
    try:
        numbers = sorted({wave_of(section, device) for _, section in mine})
        waves = [[one for one in mine if wave_of(one[1], device) == number] for number in numbers]
        seconds = run_waves(waves, plan, begun + args.seconds, file.add)
    finally:
        clean(out)
    print(summary(file.rows, seconds))
    count = sum(row["ok"] is False for row in file.rows)
    said = f"{len(file.rows)} rows, {count} wrong, {time.monotonic() - begun:.0f} s, device {device}"
    print(f"{said}: {file.path}")
    return 1 if count else 0


def wave_of(section: Section, device: str) -> int:
    """In a rehearsal nothing is timed, and sections wait for those alone that they need."""
    return section.wave if device == "cuda" else 1


def with_needs(chosen: list[str], sections: dict[str, tuple[str, Section]]) -> set[str]:
    return set(chosen) | {need for name in chosen if name in sections for need in sections[name][1].needs}


def versions() -> dict[str, str]:
    """Of what a number depends on. megapar: the commit, where there is git."""
    found = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        found["triton"] = importlib.import_module("triton").__version__
    except ImportError:  # card-only
        found["triton"] = "none"
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        found["megapar"] = done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):  # card-only
        found["megapar"] = "unknown"
    return found


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text}: need a number above 0 and below a day")  # card-only
    return seconds


def locked(out: Path) -> TextIO:
    """An open file that keeps other runs out of this folder until it is closed, be it by the end of this process.

    Raises BlockingIOError where one is there, OSError where nothing can be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = (out / LOCK).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def prepare(out: Path) -> None:
    """An empty place for this run's files. Raises OSError where it can't be written to."""
    for folder in (out / WORK, out / LOGS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    rows = out / "accept.json"
    if rows.exists() and len(rows.read_text()) > len("[]\n"):  # a card's time went into them
        rows.rename(out / f"accept-{time.strftime('%Y%m%d-%H%M%S', time.localtime(rows.stat().st_mtime))}.json")
    rows.write_text("[]\n")


def clean(out: Path) -> None:
    """Only rows stay, and what logs say."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in (out / LOGS).glob("*.txt"):
        if not path.stat().st_size:
            path.unlink()


def interrupted(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)  # card-only


def refuse(text: str) -> int:
    print(text, file=sys.stderr)  # card-only
    return 2  # card-only
