"""Plans as text: short enough to keep, and one line for one thing, so that a difference is a difference of lines."""

from collections.abc import Iterator, Sequence

_LONGEST = 80  # lines of a block that is looked for again


def fold(lines: Sequence[str]) -> list[str]:
    """Lines with every block that follows on itself written once: `3 x LINE`, or `3 x {`, the block, `}`."""
    folded: list[str] = []
    at = 0
    while at < len(lines):
        length, times = _best_block(lines, at)
        if times == 1:
            folded.append(lines[at])
        elif length == 1:
            folded.append(f"{times} x {lines[at]}")
        else:
            inner = fold(lines[at : at + length])
            folded += [f"{times} x {{", *(f"  {line}" for line in inner), "}"]
        at += length * times
    return folded


def _best_block(lines: Sequence[str], at: int) -> tuple[int, int]:
    """(length, times) of the block from `at` on that saves most lines; (1, 1) if none does."""
    best, saved = (1, 1), 0
    for length in range(1, min(_LONGEST, (len(lines) - at) // 2) + 1):
        block, times = lines[at : at + length], 1
        while lines[at + times * length : at + (times + 1) * length] == block:
            times += 1
        gain = (times - 1) * length - (2 if length > 1 else 0)
        if times > 1 and gain > saved:
            best, saved = (length, times), gain
    return best


def by_rank(title: str, of_ranks: dict[int, list[str]]) -> Iterator[str]:
    """A section of a plan: ranks that have the same lines share them."""
    ranks_of: dict[tuple[str, ...], list[int]] = {}
    for rank, lines in of_ranks.items():
        ranks_of.setdefault(tuple(lines), []).append(rank)
    for shared, ranks in ranks_of.items():
        yield ""
        yield f"{title}, rank {spans(ranks)}"
        yield from (f"  {line}" for line in shared)


def spans(numbers: Sequence[int]) -> str:
    """Numbers in order as `0-3 8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return " ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def wrapped(words: Sequence[str], width: int = 110) -> list[str]:
    """Words in lines."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
