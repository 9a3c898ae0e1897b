"""The error for anything a user can mend."""


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
    """A value as it is written on the command line: `true`, `null`, `[5,3]`."""
    if isinstance(value, list | tuple):
        return "[" + ",".join(show(item) for item in value) + "]"
    return (
        {True: "true", False: "false", None: "null"}[value] if value is None or isinstance(value, bool) else str(value)
    )
