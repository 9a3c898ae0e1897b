"""Compares two checkouts bit for bit: the losses and gradient norms of ten short runs of `megapar train`.

    python tests/plan/bits.py write BEFORE.json [--python PYTHON]   PYTHON: of an environment that has megapar
    python tests/plan/bits.py compare BEFORE.json AFTER.json        exit code 1 and the first difference of every run

Both on one machine with one torch: others may add in another order. It knows nothing of megapar but its command line
and `metrics.jsonl`, and needs only the standard library.
"""

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VOCABULARY = 61
COMMON = {
    "model.hidden": 16,
    "model.layers": 4,
    "model.heads": 4,
    "model.kv_heads": 2,
    "model.ffn": 32,
    "model.vocab_size": VOCABULARY,
    "optim.lr": 0.01,
    "optim.warmup_steps": 2,
    "optim.clip_grad": 0.5,
    "parallel.bucket_size": 1000,
    "parallel.dp": 1,
    "train.steps": 4,
    "train.seq_length": 8,
    "train.micro_batch_size": 1,
    "train.global_batch_size": 8,
    "train.device": "cpu",
    "checkpoint.every": 0,
    "logger": "disabled",
    "logger.progress": "false",
}
GPT2 = {
    "model.norm": "layernorm",
    "model.position": "learned",
    "model.activation": "gelu",
    "model.bias": "true",
    "model.tied": "true",
}
RUNS: dict[str, dict[str, object]] = {
    "single_fp64_evaluation": {"train.dtype": "fp64", "train.eval_every": 2, "train.eval_samples": 6},
    "single_gpt2_bf16_dropout": {**GPT2, "train.dtype": "bf16", "model.dropout": 0.1},
    "tp2_sp_fp32_chunked": {"parallel.tp": 2, "parallel.sequence_parallel": "true", "parallel.tp_overlap": "chunked"},
    "pp2_gpt2_fp32_tied": {**GPT2, "parallel.pp": 2, "train.recompute": "full"},
    "dp2_bf16_zero": {"parallel.dp": 2, "train.dtype": "bf16", "parallel.zero": 1},
    "dp2_fp32_powersgd": {"parallel.dp": 2, "parallel.grad_compression": "powersgd", "parallel.powersgd_rank": 2},
    "tp2pp2dp2_fp64": {"parallel.tp": 2, "parallel.pp": 2, "parallel.dp": 2, "train.dtype": "fp64"},
    "tp4_sp_fp32_dropout": {"parallel.tp": 4, "parallel.sequence_parallel": "true", "model.dropout": 0.1},
    "pp4_fp32_zb_h1": {"parallel.pp": 4, "pipeline.schedule": "zb_h1"},
    "tp2_symmetric": {
        "parallel.tp": 2,
        "parallel.tp_overlap": "symmetric",
        "kernels.backend": "interpret",
        "model.layers": 1,
        "train.steps": 2,
        "train.global_batch_size": 2,
    },
}
FIGURES = ("loss", "grad_norm", "val_loss")


def write_tokens(prefix: Path) -> None:
    """Random documents as Megatron's .bin and .idx, uint16, the same everywhere."""
    chance = random.Random(0)
    documents = [[chance.randrange(VOCABULARY) for _ in range(chance.randrange(20, 60))] for _ in range(40)]
    lengths = [len(document) for document in documents]
    starts = [2 * sum(lengths[:number]) for number in range(len(lengths))]
    body = b"".join(struct.pack(f"<{len(document)}H", *document) for document in documents)
    prefix.with_suffix(".bin").write_bytes(body)
    count = len(documents)
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, count, count + 1)
    places = struct.pack(f"<{count}i{count}q{count + 1}q", *lengths, *starts, *range(count + 1))
    prefix.with_suffix(".idx").write_bytes(head + places)


def figures(python: str, folder: Path, name: str) -> list[str]:
    """The figures of a run's steps and evaluations, in order: `STEP FIGURE HEX`. Raises SystemExit if it fails."""
    values = COMMON | RUNS[name] | {"data.path": folder / "tokens", "run.dir": folder / name}
    command = [python, "-m", "megapar.cli", "train", *(f"{key}={value}" for key, value in values.items())]
    drop = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "SLURM_", "TORCHELASTIC", "MEGAPAR_", "TRITON_", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    done = subprocess.run(
        command, cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{name}: {' '.join(command)}\n{done.stdout}{done.stderr}")
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [f"{row['step']} {key} {as_hex(row[key])}" for row in rows for key in FIGURES if key in row]


def as_hex(value: float | None) -> str:
    """All the bits of a figure; null is what is not finite."""
    return "null" if value is None else float(value).hex()


def write(out: Path, python: str) -> None:
    found = {}
    with tempfile.TemporaryDirectory(prefix="bits-") as scratch:
        folder = Path(scratch)
        write_tokens(folder / "tokens")
        for name in RUNS:
            start = time.monotonic()
            found[name] = figures(python, folder, name)
            print(f"{name}: {len(found[name])} figures, {time.monotonic() - start:.1f} s", flush=True)
    out.write_text(json.dumps(found, indent=1) + "\n")


def compare(first: Path, second: Path) -> bool:
    """Print the first difference of every run; whether there is none."""
    before, after = json.loads(first.read_text()), json.loads(second.read_text())
    same = True
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name, []), after.get(name, [])
        at = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        if a == b:
            print(f"{name}: {len(a)} figures, the same")
            continue
        same = False
        print(f"{name}: {line(a, at)} in {first}, {line(b, at)} in {second}")
    return same


def line(figures: list[str], at: int) -> str:
    """`step 2 loss 4.1 (0x1.07p+2)`"""
    if at >= len(figures):
        return "nothing more"
    step, name, value = figures[at].split()
    return f"step {step} {name} {value if value == 'null' else float.fromhex(value)!r} ({value})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two checkouts on one machine, bit for bit.")
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="run, and write the figures")
    writing.add_argument("out", type=Path)
    writing.add_argument("--python", default=sys.executable, help="of an environment that has megapar")
    comparing = commands.add_parser("compare", help="exit code 1 where figures differ")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    given = parser.parse_args()
    if given.command == "write":
        write(given.out, given.python)
    else:
        sys.exit(0 if compare(given.first, given.second) else 1)


if __name__ == "__main__":
    main()
