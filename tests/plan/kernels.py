"""Hashes of the compiled kernels' instructions: whether a change of the source changed what a GPU would run.

Hashed are the instructions alone, which know neither paths nor lines. Only the same version of the compiler makes the
same code.
"""

import hashlib
import json
import re
from pathlib import Path

from tests.plan import reading

HASHES = Path(__file__).with_name("kernels.json")
TARGETS = ("sm_80", "sm_90")


def hashes(targets: tuple[str, ...] = TARGETS) -> dict[str, str]:
    """SHA-256 by target and name of the kernel, and the version of the compiler as `triton`."""
    found = {f"{target} {name}": digest(text) for target, name, text in reading.machine_code(targets)}
    return {"triton": reading.compiler(), **dict(sorted(found.items()))}


def digest(text: str) -> str:
    """Of the instructions, one a line."""
    return hashlib.sha256("\n".join(instructions(text)).encode()).hexdigest()


def instructions(text: str) -> list[str]:
    """The instructions and branch targets of disassembled code (nvdisasm -c), without addresses and directives."""
    lines = (re.sub(r"/\*.*?\*/|//.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line.endswith(";") or line.startswith(".L_")]


def write() -> None:
    HASHES.write_text(json.dumps(hashes(), indent=1) + "\n", encoding="utf-8")
