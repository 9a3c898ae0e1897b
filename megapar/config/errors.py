"""The error for anything a user can mend."""


class UserError(Exception):
    """Something the user gave can't work. `str(error)` is one line: what, where, and what to do.

    The command line prints it and exits with 2, before any worker starts.
    """


class ConfigError(UserError):
    """A configuration value that can't work, named by its dotted key."""

    def __init__(self, key: str, value: object, problem: str) -> None:
        super().__init__(f"{key}={value}: {problem}")
        self.key = key
