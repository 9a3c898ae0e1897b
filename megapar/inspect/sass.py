"""NVIDIA machine code as nvdisasm writes it: instructions, loops, and how fast a loop could run.

The bounds are those of a throughput model: cycles that each unit of an SM needs for one iteration of a thread block's
loop, from public rates (CUDA programming guide, arithmetic instructions; FlashAttention-4). They know no latency, bank
conflict, cache or clock. They order variants of one kernel; they predict no time. Which unit an opcode keeps busy is
our reading: NVIDIA does not document it.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T0-9]+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"^(\.L_\w+):")
BRANCHES = ("BRA", "BRX", "BRXU", "JMP", "JMX")
ENDS = ("EXIT", "RET", "BPT", "KILL")

# unit -> opcodes, first match wins; what none matches is integer and logic work
UNITS = {
    "mma": r"(H|I|Q|B|D)G?MMA|OMMA|UTC[A-Z]*MMA",
    "mufu": r"MUFU",
    "spill": r"LDL|STL",
    "tmem": r"(LDTM|STTM|UTCCP|UTCSHIFT|LDT|STT)(?![A-Z])",
    "tma": r"UTMA|UBLK",
    "async": r"LDGSTS|LDGDEPBAR",
    "load": r"LDG|LD(?![A-Z])",
    "store": r"STG|STAS|ST(?![A-Z])",
    "atomic": r"ATOM|RED(?!UX)|UREDGR",
    "lds": r"LDS",
    "sts": r"STS",
    "shuffle": r"SHFL|VOTE|REDUX|MATCH",
    "barrier": r"BAR|MEMBAR|WARPSYNC|WARPGROUP|DEPBAR|SYNCS|UTCBAR|FENCE|CCTL|ERRBAR|NANOSLEEP|ACQBULK|ELECT|B2R|R2B"
    r"|UCGABAR|USETMAXREG|UTCATOMSWS|ARRIVES|CGAERRBAR",
    "fma": r"F(FMA|ADD|MUL)|FSWZADD|H(FMA|ADD|MUL)2|IMAD|FCHK",
    "convert": r"F2|I2|FRND",
    "control": r"BR[AX]|JMP|EXIT|CALL|RET|BSSY|BSYNC|BREAK|BMOV|YIELD|WARPEXIT|NOP|BPT|KILL|PREEXIT",
    "uniform": r"U[A-Z]|R2UR|S2UR|LDCU?(?![A-Z])|CS2U?R|PLOP3|R2P|P2R|S2R",
    "alu": r"",
}
UNITS_BY_PATTERN = [(unit, re.compile(pattern)) for unit, pattern in UNITS.items()]
WIDTHS = {".U8": 1, ".S8": 1, ".U16": 2, ".S16": 2, ".64": 8, ".128": 16, ".256": 32}
K_BYTES = 32  # of the operands of one matrix instruction, along the summed dim


@dataclass(frozen=True)
class Machine:
    """What one SM does per clock: dense 16-bit tensor FLOPs, operations of the other units, bytes of shared memory."""

    mma: int
    fma: int
    alu: int = 64
    mufu: int = 16
    convert: int = 64
    smem: int = 128


MACHINES = {"sm_80": Machine(2048, 64), "sm_90": Machine(4096, 128), "sm_100": Machine(8192, 128)}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def unit(self) -> str:
        return next(unit for unit, pattern in UNITS_BY_PATTERN if pattern.match(self.opcode))

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a memory instruction moves for each thread."""
        if self.opcode.startswith(("LDSM", "STSM")):
            matrices = re.search(r"\.(1|2|4)(?=\.|$)", self.opcode)
            return 4 * int(matrices[1] if matrices else 4)
        return next((size for mark, size in WIDTHS.items() if mark in self.opcode), 4)


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions in order, and those among them that every iteration executes."""

    body: list[Instruction]
    always: list[Instruction]

    def count(self) -> Counter[str]:
        """Instructions of one iteration by unit."""
        return Counter(i.unit for i in self.work)

    @property
    def work(self) -> list[Instruction]:
        """What an iteration executes. On sm_100 one thread issues the matrix instructions: those count anywhere."""
        known = {i.address for i in self.always}
        return self.always + [i for i in self.body if i.unit == "mma" and i.address not in known]


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions, and the position of each label."""
    instructions: list[Instruction] = []
    labels = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            instructions.append(Instruction(int(found[1], 16), found[2], found[3], found[4].strip()))
    return instructions, labels


def innermost_loops(instructions: list[Instruction], labels: dict[str, int]) -> list[Loop]:
    """The loops that hold no other loop but one that only waits. Assumes that each loop is entered at one place."""
    blocks, successors = _blocks(instructions, labels)
    predecessors: dict[int, list[int]] = {block: [] for block in range(len(blocks))}
    for block, targets in enumerate(successors):
        for target in targets:
            predecessors[target].append(block)
    latches: dict[int, list[int]] = {}
    for block, header in _back_edges(successors):
        latches.setdefault(header, []).append(block)
    bodies = {header: _reach(ends, header, predecessors) for header, ends in latches.items()}
    spins = {
        header for header, body in bodies.items() if _only_waits([instructions[i] for b in body for i in blocks[b]])
    }
    spinning = set().union(*(bodies[header] for header in spins))
    loops = []
    for header, body in sorted(bodies.items()):
        inner = any(other < body for name, other in bodies.items() if name != header and name not in spins)
        if header in spins or inner:
            continue
        kept = sorted(body - spinning)
        always = [b for b in kept if b == header or not _avoids(b, header, latches[header], body, successors)]
        loops.append(Loop(*([instructions[i] for b in chosen for i in blocks[b]] for chosen in (kept, always))))
    return loops


def _blocks(instructions: list[Instruction], labels: dict[str, int]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks as ranges of instructions, and the blocks that each can go on to."""
    jumps, stops, cuts = {}, set(), set()
    for position, instruction in enumerate(instructions):
        if instruction.base in BRANCHES and not instruction.opcode.startswith(
            "BRA.DIV"
        ):  # never taken without divergence
            jumps[position] = [labels[name] for name in re.findall(r"\.L_\w+", instruction.operands) if name in labels]
            # `BRA P0, target` depends on P0 too
            if instruction.predicate is None and instruction.operands.startswith("`("):
                stops.add(position)
            cuts.add(position)
        elif instruction.base in ENDS:
            cuts.add(position)
            if instruction.predicate is None:
                stops.add(position)
    starts = {0, *labels.values(), *(cut + 1 for cut in cuts)}
    edges = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    blocks = [range(a, b) for a, b in pairwise(edges)]
    at = {block.start: number for number, block in enumerate(blocks)}
    successors = []
    for number, block in enumerate(blocks):
        last = block[-1]
        targets = [at[target] for target in jumps.get(last, []) if target in at]
        successors.append(targets + ([number + 1] if last not in stops and number + 1 < len(blocks) else []))
    return blocks, successors


def _back_edges(successors: list[list[int]]) -> list[tuple[int, int]]:
    """(from, to) of the edges of a depth-first walk that lead to a block still being walked."""
    found, open_blocks, done = [], {0}, set()
    stack = [(0, iter(successors[0]))]
    while stack:
        block, targets = stack[-1]
        for target in targets:
            if target in open_blocks:
                found.append((block, target))
            elif target not in done:
                open_blocks.add(target)
                stack.append((target, iter(successors[target])))
                break
        else:
            stack.pop()
            open_blocks.discard(block)
            done.add(block)
    return found


def _reach(ends: list[int], header: int, predecessors: dict[int, list[int]]) -> set[int]:
    """The blocks from which an end can be reached without passing the header, and the header."""
    body, stack = {header}, list(ends)
    while stack:
        block = stack.pop()
        if block not in body:
            body.add(block)
            stack += predecessors[block]
    return body


def _avoids(block: int, header: int, latches: list[int], body: set[int], successors: list[list[int]]) -> bool:
    """Whether an iteration can go from the header to a latch around the block."""
    seen, stack = {header}, [header]
    while stack:
        current = stack.pop()
        if current in latches and current != block:
            return True
        for target in successors[current]:
            if target in body and target != block and target not in seen:
                seen.add(target)
                stack.append(target)
    return False


def _only_waits(body: list[Instruction]) -> bool:
    """Whether a loop only polls a barrier or a flag. Around a barrier's poll, IMAD is a move."""
    work = {"mma", "mufu", "tma", "sts", "store", "async"}
    if not any(instruction.opcode.startswith("SYNCS.PHASECHK") for instruction in body):
        work.add("fma")
    return len(body) < 14 and not work & {instruction.unit for instruction in body}


@dataclass(frozen=True)
class Bounds:
    """How much of the tensor cores' rate a loop could reach at most.

    perfect: all units overlap; serial: the tensor cores wait for the rest; overlap: share of the other instructions
    issued while a matrix instruction is in flight (sm_90), and lockstep: the bound that this overlap allows where all
    warp groups are in the same phase.
    """

    cycles: dict[str, float]
    perfect: float
    serial: float
    limit: str
    overlap: float | None = None
    lockstep: float | None = None


def tcgen05_shapes(instructions: list[Instruction]) -> dict[int, tuple[int, int]]:
    """(M, N) of the tcgen05 matrix instructions by address, as far as it is known.

    Their mnemonic doesn't say it: it is in a 32-bit descriptor, here the constant last moved into its register.
    """
    constants: dict[str, int | None] = {}
    shapes = {}
    for instruction in instructions:
        target = instruction.operands.split(",")[0].strip()
        if descriptor := re.search(r"idesc\[(UR\d+)\]", instruction.operands):
            bits = constants.get(descriptor[1])
            if bits is not None:
                shapes[instruction.address] = ((bits >> 24 & 0x1F) * 16, (bits >> 17 & 0x3F) * 8)
        elif re.fullmatch(r"UR\d+", target):
            value = re.fullmatch(r"UR\d+, (0x[0-9a-f]+)", instruction.operands)
            constants[target] = int(value[1], 16) if value and instruction.base == "UMOV" else None
    return shapes


def bounds(loop: Loop, arch: str, warps: int, shapes: dict[int, tuple[int, int]]) -> Bounds | None:
    """Bounds of a loop of `warps` warps, None without matrix instructions of known shapes (see `tcgen05_shapes`)."""
    machine = MACHINES[arch]
    work = loop.work
    flops, operand_bytes = 0.0, 0.0
    for instruction in work:
        if instruction.unit == "mma":
            size = _mma(instruction, warps, shapes.get(instruction.address))
            if size is None:
                return None
            halved = 2 if "TF32" in instruction.opcode else 1  # tf32 runs at half the rate of 16 bits
            flops, operand_bytes = flops + size[0] * halved, operand_bytes + size[1]
    if not flops:
        return None
    count = Counter(instruction.unit for instruction in work)
    # Integer multiply-adds and packed fp32 pairs hold the pipe twice as long.
    slow = sum(bool(re.match(r"IMAD(?!\.MOV)|F(FMA|ADD|MUL)2", i.opcode)) for i in work)
    shared = sum(32 * i.width for i in work if i.unit in ("lds", "sts") or i.opcode.startswith("LDGSTS"))
    lanes = 32 * warps
    cycles = {
        "mma": flops / machine.mma,
        "mufu": count["mufu"] * lanes / machine.mufu,
        "fma": (count["fma"] + slow) * lanes / machine.fma,
        "alu+convert": count["alu"] * lanes / machine.alu + count["convert"] * lanes / machine.convert,
        "issue": len(work) * warps / 4,
        "smem": (shared * warps + operand_bytes) / machine.smem,
    }
    limit = max(cycles, key=cycles.__getitem__)
    other = max(cycles[unit] for unit in ("mufu", "fma", "alu+convert", "issue"))
    tensor = cycles["mma"]
    overlap = _overlap(loop.always) if any(i.base.endswith("GMMA") for i in loop.always) else None
    lockstep = None
    if overlap is not None:
        lockstep = tensor / (max(tensor, overlap * other, cycles["smem"]) + (1 - overlap) * other)
    return Bounds(cycles, tensor / cycles[limit], tensor / (tensor + other), limit, overlap, lockstep)


def _mma(instruction: Instruction, warps: int, shape: tuple[int, int] | None) -> tuple[float, float] | None:
    """(FLOPs, bytes of shared memory read) of a matrix instruction over the whole thread block."""
    if group := re.match(r"[HBQI]GMMA\.64x(\d+)x(\d+)", instruction.opcode):
        n, k = int(group[1]), int(group[2])
        # A register as second operand holds the left matrix; else one descriptor names both matrices.
        rows = n + (64 if instruction.operands.split(",")[1].strip().startswith("gdesc") else 0)
        return 2 * 64 * n * k * warps / 4, rows * K_BYTES * warps / 4
    if single := re.match(r"HMMA\.(16816|1688)", instruction.opcode):
        return 2 * 16 * 8 * (16 if single[1] == "16816" else 8) * warps, 0.0
    if instruction.base.startswith("UTC") and shape:
        return 2 * shape[0] * shape[1] * (8 if "TF32" in instruction.opcode else 16), 0.0
    return None


def _overlap(body: list[Instruction]) -> float:
    """Share of instructions that are issued between a wgmma's start and the wait for it, in the second of two rounds.

    Branches, barriers and work of the uniform data path are not counted.
    """
    groups, started, under, total = 0, False, 0, 0
    for second in (False, True):
        for instruction in body:
            if instruction.base.endswith("GMMA"):
                closes = "gsb0" in instruction.operands
                groups, started = groups + closes, not closes
            elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
                if left := re.search(r"gsb0, 0x([0-9a-f]+)", instruction.operands):
                    groups = min(groups, int(left[1], 16))
            elif second and instruction.unit not in ("uniform", "control", "barrier"):
                total += 1
                under += groups > 0 or started
    return under / total if total else 0.0
