"""What compiled code does in which order: its instructions as blocks, the loops they make, and marks that travel along
every path through them."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

from megapar.inspect.compile import Spec, compile_spec
from megapar.kernels.comm import exchange, matmul, symmetric

Edit = tuple[str, str, str, str]  # module, function, text in its source, what stands there instead


def compiled(spec: Spec, edits: tuple[Edit, ...] = ()) -> str:
    """PTX of a kernel; with edits, of what it would be if the source of some of its functions were another one."""
    functions = [getattr(import_module(module), name) for module, name, _, _ in edits]
    sources = [function.src for function in functions]
    try:
        for function, (_, name, old, new) in zip(functions, edits, strict=True):
            assert old in function.src, f"{name} has no {old}"
            function._unsafe_update_src(function.src.replace(old, new))
        _forget_hashes()
        return str(compile_spec(spec).asm["ptx"])
    finally:
        for function, source in zip(functions, sources, strict=True):
            function._unsafe_update_src(source)
        _forget_hashes()


def _forget_hashes() -> None:
    """A function's hash is also that of all it calls, so none holds when one is edited."""
    for module in (symmetric, exchange, matmul):
        for function in vars(module).values():
            if hasattr(function, "_unsafe_update_src"):
                function.hash = None


@dataclass
class Block:
    """opcodes: in order, with all their suffixes; next: numbers of the blocks that may follow."""

    opcodes: list[str] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


def blocks_of(text: str) -> list[Block]:
    """The blocks of the only kernel in a text, the first one first."""
    blocks, labels = [Block()], {}
    jumps: list[tuple[int, str]] = []
    open_ended = True  # whether the last block goes on into the next one

    def new_block() -> None:
        nonlocal open_ended
        blocks.append(Block())
        if open_ended:
            blocks[-2].next.append(len(blocks) - 1)
        open_ended = True

    for line in text[text.index("{\n") :].splitlines():
        line = line.partition("//")[0].strip()
        label = re.match(r"(\$L__BB\w+):", line)
        if label:
            new_block()
            labels[label[1]] = len(blocks) - 1
        for statement in [] if line.startswith((".", "$")) else line.split(";"):
            found = re.match(r"\s*(@!?%\w+\s+)?([a-z][\w.:]*)(.*)", statement)
            if not found or statement.endswith(":"):
                continue
            blocks[-1].opcodes.append(found[2])
            target = re.search(r"\$L__BB\w+", found[3])
            if found[2].startswith("bra") and target:  # others are loops of one instruction's own
                jumps.append((len(blocks) - 1, target[0]))
            if found[2] == "ret" or (found[2].startswith("bra") and target):
                open_ended = bool(found[1])
                new_block()
    for block, label_name in jumps:
        blocks[block].next.append(labels[label_name])
    return blocks


def marks(
    blocks: list[Block], change: Callable[[str, frozenset[str]], frozenset[str]]
) -> list[tuple[str, frozenset[frozenset[str]]]]:
    """Every instruction that can be reached, and the sets of marks with which it can be, by any path.

    change: (opcode, marks before it) -> marks after it; nothing is marked at the beginning.
    """
    before: list[set[frozenset[str]]] = [set() for _ in blocks]
    before[0].add(frozenset())
    changed = [0]
    found: dict[tuple[int, int], set[frozenset[str]]] = {}
    while changed:
        number = changed.pop()
        for state in list(before[number]):
            for position, opcode in enumerate(blocks[number].opcodes):
                found.setdefault((number, position), set()).add(state)
                state = change(opcode, state)
            for following in blocks[number].next:
                if state not in before[following]:
                    before[following].add(state)
                    changed.append(following)
    return [(blocks[number].opcodes[at], frozenset(states)) for (number, at), states in found.items()]


def innermost_loop(blocks: list[Block], contains: Callable[[str], bool]) -> Counter[str]:
    """How often each opcode stands in the smallest loop that has one of these."""
    loops = []
    for header in range(len(blocks)):
        without = _reached(blocks, {0} - {header}, avoid=header)
        reachable = _reached(blocks, {0}, avoid=-1)
        backward = [n for n in reachable - without if header in blocks[n].next]  # header is on every way to these
        body = {header}
        unseen = list(backward)
        while unseen:
            number = unseen.pop()
            if number not in body:
                body.add(number)
                unseen += [n for n in reachable if number in blocks[n].next]
        if backward:
            loops.append(Counter(opcode for number in body for opcode in blocks[number].opcodes))
    return min((loop for loop in loops if any(map(contains, loop))), key=lambda loop: loop.total())


def _reached(blocks: list[Block], start: set[int], avoid: int) -> set[int]:
    found, unseen = set(start), list(start)
    while unseen:
        for following in blocks[unseen.pop()].next:
            if following != avoid and following not in found:
                found.add(following)
                unseen.append(following)
    return found


def starts_with(*kinds: str) -> Callable[[str], bool]:
    return lambda opcode: opcode.startswith(kinds)


def is_mma(opcode: str) -> bool:
    return opcode.startswith(("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


def is_tma_load(opcode: str) -> bool:
    return opcode.startswith("cp.async.bulk.tensor") and ".shared::cta.global" in opcode


def count(loop: Counter[str], which: Callable[[str], bool]) -> int:
    return sum(number for opcode, number in loop.items() if which(opcode))
