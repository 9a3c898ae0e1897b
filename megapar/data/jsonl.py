"""Lines of JSON: objects with their line numbers, and errors that name file and line."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megapar.config.errors import ConfigError, UserError
from megapar.files import special

MOST = 500  # characters of an error


@dataclass(frozen=True)
class Line:
    """An object of a JSONL file. path, number: where it stands; lines are counted from 1; place: what errors call that,
    for an object that is no line."""

    path: Path
    number: int
    values: Mapping[str, Any]
    place: str = ""

    def wrong(self, problem: str) -> UserError:
        """The error for what is wrong with it: one line, whatever keys and values it quotes."""
        quoted = " ".join(problem.split())
        place = self.place or f"{self.path}:{self.number}"
        return UserError(f"{place}: {quoted if len(quoted) <= MOST else quoted[:MOST] + '...'}")

    def text(self, key: str, *, empty: bool = False) -> str:
        """The text of a key. Raises UserError where it is missing, no text, or blank. empty: no text at all will do"""
        if key not in self.values:
            there = ", ".join(map(str, self.values)) or "nothing"
            raise self.wrong(f'has no "{key}"; it has {there}')
        value = self.values[key]
        if not isinstance(value, str):
            raise self.wrong(f'"{key}" is {_kind(value)}; make it a string')
        if not value.strip() and (value or not empty):
            blank = "blank" if value else "empty"
            raise self.wrong(f'"{key}" is {blank}; give some text, or remove the line')
        try:
            value.encode()
        except UnicodeEncodeError as error:
            problem = f'"{key}" is not valid Unicode: a lone surrogate at character {error.start}; remove it'
            raise self.wrong(problem) from None
        return value


def read_lines(path: Path, key: str = "data.path") -> Iterator[Line]:
    """The objects of a file, blank lines left out. Raises ConfigError for `key` where the file can't be read or has
    none, and UserError for a line that is no object of JSON."""
    count = 0
    try:
        if not path.is_file():
            kind = "folder" if path.is_dir() else path.exists() and special(path)
            raise ConfigError(
                key,
                path,
                f"{f'is a {kind}' if kind else 'no such file'}; name a .jsonl file, with an object in every line",
            )
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    count += 1
                    yield Line(path, number, parse_object(f"{path}:{number}", decoded(path, number, line.rstrip())))
    except OSError as error:
        raise ConfigError(key, path, f"can't be read ({error.strerror})") from None
    if not count:
        raise ConfigError(key, path, "holds no line of JSON; give an object in every line")


def decoded(path: str | Path, number: int, line: bytes) -> str:
    """The text of a file's line, a byte order mark left out of the first. Raises UserError for what is not UTF-8."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None


class _Twice(Exception):
    """A key of an object, given twice: which value counts is the reader's guess."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _Twice(ascii(key)[1:-1])
        values[key] = value
    return values


def parse_object(place: str, text: str) -> dict[str, Any]:
    """The object of a text of JSON. Raises UserError, which calls it `place`, where it is none."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        problem = "nested too deep; fix the line, or remove it"
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg} at column {error.colno}); fix the line, or remove it"
    except _Twice as error:
        problem = f'has "{error}" twice; keep one of them'
    except ValueError:  # Python's limit on the digits of a number, which its message would tell how to lift
        problem = "a number has too many digits; fix the line, or remove it"
    else:
        if isinstance(value, dict):
            return value
        problem = f"{_kind(value)}, not an object; write {{...}} in every line"
    raise UserError(f"{place}: {problem}")


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")
