"""AMD machine code as Triton's compiler prints it: resources, matrix instructions, the loop that holds most of them."""

import re
from collections import Counter
from typing import Any

UNITS = {
    "mma": r"v_s?mfma",
    "spill": r"scratch_",
    "lds": r"ds_",
    "load": r"(global|buffer|flat)_load",
    "store": r"(global|buffer|flat)_(store|atomic)",
    "mufu": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "scalar": r"s_",
}
LOAD_BITS = {"x4": 128, "x3": 96, "x2": 64, "short": 16, "ushort": 16}


def figures(compiled: Any) -> dict[str, Any]:
    """Figures as `compile.Figures` names them, from a compiled kernel for a gfx target."""
    text = compiled.asm["amdgcn"]

    def metadata(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    lines = [line.strip() for line in text.splitlines()]
    code = [line for line in lines if re.match(r"[a-z]+_\w", line)]
    loops = _loops(lines)
    busiest = max(loops, key=lambda loop: loop["mma"], default=Counter(_unit(line) for line in code))
    mma = next((line.split()[0] for line in code if _unit(line) == "mma"), "")
    loads = [_load_bits(line.split()[0]) for line in code if _unit(line) == "load"]
    return {
        "registers": metadata("vgpr_count"),
        "spill_bytes": 4 * metadata("vgpr_spill_count"),
        "shared_bytes": compiled.metadata.shared,
        "mma": mma,
        "widest_load": max(loads, default=0),
        "loop": dict(busiest.most_common()),
    }


def _unit(line: str) -> str:
    return next((unit for unit, pattern in UNITS.items() if re.match(pattern, line)), "valu")


def _load_bits(opcode: str) -> int:
    return next((bits for mark, bits in LOAD_BITS.items() if opcode.endswith(mark)), 32)


def _loops(lines: list[str]) -> list[Counter[str]]:
    """Instructions by unit of each innermost loop: from a label to the last branch back to it."""
    labels = {line.split(":")[0]: number for number, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    spans = []
    for number, line in enumerate(lines):
        target = re.match(r"s_c?branch\w*\s+(\.LBB\w+)", line)
        if target and labels.get(target[1], number) < number:
            spans.append((labels[target[1]], number))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [Counter(_unit(x) for x in lines[a : b + 1] if re.match(r"[a-z]+_\w", x)) for a, b in inner]
