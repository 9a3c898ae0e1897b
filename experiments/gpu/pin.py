"""Writes a Config into its row of a kernel's table, in the file where the table stands."""

import ast
from typing import Any

WIDTH = 120


def pinned(text: str, key: tuple[Any, ...], place: int | None, config: Any) -> str:
    """The source of a file with CONFIGS[key], or its place in that row's tuple, replaced; all else stays as it is.

    Raises ValueError where there is no such row.
    """
    node = row_of(ast.parse(text), key, place)
    lines = text.splitlines(keepends=True)
    begin, end = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before, after = lines[begin][: node.col_offset], lines[end][node.end_col_offset :]
    call = call_of(config)
    if len(before) + len(call) + len(after.rstrip()) > WIDTH:
        indent = before[: len(before) - len(before.lstrip())]
        call = f"Config(\n{indent}    {call[len('Config(') : -1]}\n{indent})"
    return "".join([*lines[:begin], before + call + after, *lines[end + 1 :]])


def row_of(tree: ast.Module, key: tuple[Any, ...], place: int | None) -> ast.expr:
    for statement in tree.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id == "CONFIGS" and isinstance(statement, ast.Assign):
            assert isinstance(statement.value, ast.Dict)
            for known, value in zip(statement.value.keys, statement.value.values, strict=True):
                if known is not None and ast.literal_eval(known) == key:
                    return value if place is None else value.elts[place]  # type: ignore[attr-defined]
    raise ValueError(f"no row {key} in CONFIGS")


def call_of(config: Any) -> str:
    """`Config(128, 64, 32, 8, 2, tma=True)`: numbers by place, the rest by name where it is not the default."""
    words = []
    for name, field in type(config).__dataclass_fields__.items():
        value = getattr(config, name)
        if value != field.default:
            words.append(
                repr(value) if isinstance(value, int) and not isinstance(value, bool) else f"{name}={text(value)}"
            )
    return f"Config({', '.join(words)})"


def text(value: Any) -> str:
    return '"' + value.replace('"', "'") + '"' if isinstance(value, str) else repr(value)
