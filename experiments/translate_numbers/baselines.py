"""What is beside the model in the table: a dictionary that puts two known numbers beside each other."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

Line = dict[str, str]
SAMPLE = 5000  # lines from which it is learned what stands between two numbers


def two_known_numbers(train: Sequence[Line], valid: Sequence[Line]) -> float:
    """Exact match of this: a source is cut into two numbers that were learned (two thousand, four hundred), of which
    the first is as long as can be, and their translations are put beside each other with what stands most often
    between two such in the target's language."""
    known = {line["source"]: line["target"] for line in train}
    between: dict[str, Counter[str]] = defaultdict(Counter)
    for line in train[:SAMPLE]:
        for first, second in _cuts(line["source"], known):
            rest = line["target"].removeprefix(first).removesuffix(second)
            if f"{first}{rest}{second}" == line["target"]:
                between[_language(line)][rest] += 1

    def translated(line: Line) -> str:
        for first, second in _cuts(line["source"], known):
            return f"{first}{between[_language(line)].most_common(1)[0][0]}{second}"
        return ""

    return sum(translated(line) == line["target"] for line in valid) / len(valid)


def _language(line: Line) -> str:
    return line["source"].partition(": ")[0]


def _cuts(source: str, known: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Translations of the two numbers that a source is cut into, the longest first number first."""
    language, _, spelled = source.partition(": ")
    for place in range(len(spelled) - 1, 0, -1):
        first = known.get(f"{language}: {spelled[:place].rstrip(' ,-')}")
        second = known.get(f"{language}: {spelled[place:].lstrip(' ,-').removeprefix('and ')}")
        if first is not None and second is not None:
            yield first, second
