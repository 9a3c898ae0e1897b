"""Rewards that the tests of the policy name."""

import zlib
from typing import Any

CALLS: list[tuple[str, str]] = []


def mixed(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """Differs for nearly every completion."""
    CALLS.append((prompt, completion))
    return zlib.crc32(completion.encode()) % 1000 / 100 + record["best"]


def letters(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """The share of letters."""
    return sum(one.isalpha() for one in completion) / max(1, len(completion))


def same(prompt: str, completion: str, record: dict[str, Any]) -> int:
    return 1


def raises(prompt: str, completion: str, record: dict[str, Any]) -> float:
    """On one prompt alone."""
    return 1.0 / 0.0 if " 7>" in prompt else 1.0


def ends(prompt: str, completion: str, record: dict[str, Any]) -> float:
    raise SystemExit(0)


def nan(prompt: str, completion: str, record: dict[str, Any]) -> float:
    return float("nan") if " 7>" in prompt else 1.0


def text(prompt: str, completion: str, record: dict[str, Any]) -> str:
    return "1.0"


def two(prompt: str, completion: str) -> float:
    return 1.0


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError


async def later(prompt: str, completion: str, record: dict[str, Any]) -> float:
    return 1.0
