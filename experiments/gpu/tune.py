#!/usr/bin/env python3
"""Time 3 to 6 alternatives for every row of the kernels' tables of block sizes, and pin the winners.

    python experiments/gpu/tune.py --out DIR [--seconds 240] [--only WORD] [--device cpu]
    python experiments/gpu/tune.py --pin DIR/tune.json

Without a GPU it rehearses: every alternative is compiled for sm_90, and run in Triton's interpreter; none is timed.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import torch  # noqa: E402
from triton.testing import do_bench  # noqa: E402

from experiments.gpu.command import refuse, versions  # noqa: E402
from experiments.gpu.compare import distance  # noqa: E402
from experiments.gpu.pin import pinned  # noqa: E402
from experiments.gpu.run import last_line  # noqa: E402
from megapar.launch.local import environment_with  # noqa: E402

SECONDS, TARGET = 240.0, "sm_90"
NEAR = {2: 8e-3, 4: 6e-5}  # bytes of an element -> how far two tilings may be apart
BETTER = 0.01  # by which an alternative must be faster than the row that is there
Found = dict[str, Any]  # row, config, kind, fits, ok, ms, note


def main() -> int:
    parser = argparse.ArgumentParser(prog="tune.py", description="Time block sizes, and pin the fastest.")
    parser.add_argument("--out", help="the folder for tune.json")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--device", default="", choices=("", "cuda", "cpu"))
    parser.add_argument("--pin", help="a tune.json of a card, whose winners are written into the tables")
    args = parser.parse_args()
    if args.pin:
        try:
            return pin(Path(args.pin))
        except (OSError, ValueError) as error:
            return refuse(f"--pin {args.pin}: {error}")
    if not args.out:
        return refuse("--out DIR: say which folder tune.json goes to")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return refuse(f"--out {args.out}: {error.strerror or error}; choose another folder")
    found = tune(args.only, device, time.monotonic() + args.seconds)
    if not found:
        return refuse(f"--only {args.only}: no row has this in its name")
    card = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    result = {"card": card, "date": f"{datetime.now(UTC):%Y-%m-%d}", "versions": versions(), "found": found}
    (out / "tune.json").write_text(json.dumps(result, indent=1))
    wrong = sum(one["ok"] is False for one in found)
    print(f"{len(found)} of {len({one['row'] for one in found})} rows, {wrong} wrong, {card}: {out / 'tune.json'}")
    return 1 if wrong else 0


def tune(only: str, device: str, end: float) -> list[Found]:
    """What was found of every row's own Config and its alternatives, in the order of the tables."""
    from experiments.gpu.alternatives import alternatives, rows

    chosen = {row.name: [row.config, *alternatives(row)] for row in rows() if only in row.name}
    found = compiled(chosen, device)
    with environment_with({"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})):
        in_workers(found, device, end)
    return [one for mine in found.values() for one in mine]


def in_workers(found: dict[str, list[Found]], device: str, end: float) -> None:
    """Try every row in another process; after an error, which may be its device's, in a new one."""
    names, workers = list(found), min(2, os.cpu_count() or 1) if device == "cpu" else 1
    while names:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            waiting = [pool.submit(tried, name, found[name], device, end - time.monotonic()) for name in names]
            for future in waiting:
                name = names.pop(0)
                try:
                    found[name] = future.result()
                except Exception as error:
                    found[name] = [one | {"ok": False, "note": last_line(error)} for one in found[name]]
                    pool.shutdown(wait=False, cancel_futures=True)
                for one in found[name]:
                    print(line_of(one), flush=True)
                if future.exception() is not None:
                    break


def compiled(chosen: dict[str, list[Any]], device: str) -> dict[str, list[Found]]:
    """Every alternative by the compiler, side by side. ok: None where it does not fit, which is no error."""
    from experiments.gpu.alternatives import launch_of, rows
    from megapar.inspect.compile import compile_all, spec_of

    by_name, specs = {row.name: row for row in rows()}, []
    for name, configs in chosen.items():
        for config in configs:
            with by_name[name].patched(config, False):
                launch, _, _ = launch_of(by_name[name], TARGET, "meta", False)
            specs.append(spec_of(name, launch, TARGET))
    figures, found = iter(compile_all(specs)), dict[str, list[Found]]()
    for name, configs in chosen.items():
        for config in configs:
            one = next(figures)
            fits = not one.error and one.shared_bytes <= one.shared_limit  # what spills is slow, which the clock says
            note = one.error or f"{one.registers} registers, {one.spill_bytes} B spilled, {one.shared_bytes} B shared"
            same = {"row": name, "config": asdict(config), "kind": "rehearsed" if device == "cpu" else "measured"}
            found.setdefault(name, []).append(same | {"fits": fits, "ok": None, "ms": None, "note": note})
    return found


def tried(name: str, found: list[Found], device: str, seconds: float) -> list[Found]:
    """Run, compare and on a card time what fits of a row. In a process of its own, which may fail with its device."""
    from experiments.gpu.alternatives import launch_of, rows
    from megapar.kernels._common import target_arch

    end, cpu = time.monotonic() + seconds, device == "cpu"
    [row] = [row for row in rows() if row.name == name]
    torch.manual_seed(1)
    launch, exact, work = launch_of(row, target_arch(), device, cpu)
    launch.run()
    for one in found:
        if not one["fits"] or time.monotonic() > end:
            one |= {"kind": "skipped", "reason": "no time left" if one["fits"] else "does not fit"}
            continue
        with row.patched(type(row.config)(**one["config"]), cpu):
            torch.manual_seed(1)
            launch, outputs, _ = launch_of(row, target_arch(), device, cpu)
        launch.run()
        away = max(distance(out, known) for out, known in zip(outputs, exact, strict=True))
        one["ok"] = away <= NEAR[row.size]
        if not cpu:
            one["ms"] = float(do_bench(launch.run, warmup=10, rep=60, return_mode="median"))
            one["note"] = f"{work / one['ms']:.0f} TFLOP/s, {one['note']}"
    return found


def line_of(one: Found) -> str:
    word = "skip" if one["kind"] == "skipped" else "ok" if one["ok"] else "WRONG"
    sizes = " ".join(f"{name}={value}" for name, value in one["config"].items() if name != "source")
    took = "" if one["ms"] is None else f"{one['ms']:.3f} ms"
    return f"{word:<5} {one['row']}: {sizes}  {took} {one.get('reason', '')} {one['note']}"


def winners(found: list[Found]) -> dict[str, Found]:
    """The fastest of every row that was measured; the row that is there, unless another one is faster by BETTER."""
    rows: dict[str, list[Found]] = {}
    for one in found:
        if one["kind"] == "measured" and one["ok"] and one["ms"]:
            rows.setdefault(one["row"], []).append(one)
    there = {one["row"]: one for one in reversed(found)}
    fastest = {name: min(mine, key=lambda one: one["ms"]) for name, mine in rows.items()}
    close = {name: (there[name]["ms"] or math.inf) * (1 - BETTER) <= one["ms"] for name, one in fastest.items()}
    return {name: there[name] if close[name] else one for name, one in fastest.items()}


def pin(path: Path) -> int:
    """Write the winners of a run into the tables. Raises ValueError where no card has timed any."""
    from experiments.gpu.alternatives import rows

    result = json.loads(path.read_text())
    best = winners(result["found"])
    if not best:
        raise ValueError("no card has timed anything there")
    source = f"{result['card']}, triton {result['versions']['triton']}, {result['date']}"
    for row in rows():
        if row.name in best:
            file, config = Path(str(row.table.__file__)), best[row.name]["config"] | {"source": source}
            file.write_text(pinned(file.read_text(), row.key, row.place, type(row.config)(**config)))
            print(f"{row.name}: {best[row.name]['ms']:.3f} ms, in {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
