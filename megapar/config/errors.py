"""The error for anything a user can mend."""

from dataclasses import fields, is_dataclass


class UserError(Exception):
    """Something the user gave can't work. `str(error)` is one line: what, where, and what to do.

    The command line prints it and exits with 2, before any worker starts.
    """


class ConfigError(UserError):
    """A configuration value that can't work, named by its dotted key."""

    def __init__(self, key: str, value: object, problem: str) -> None:
        super().__init__(f"{key}={show(value)}: {problem}")
        self.key = key


def show(value: object) -> str:
    """A value as it is written on the command line: `true`, `null`, `[5,3]`, `{head: {lr_scale: 0.5}}`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {show(_plain(item))}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return (
        {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
    )


def _plain(item: object) -> object:
    """A group of options as a mapping, without those that are left open."""
    if not is_dataclass(item):
        return item
    values = {one.name: getattr(item, one.name) for one in fields(item)}
    return {name: value for name, value in values.items() if value is not None}
