"""Packages that only experiments need: imported where they are used, so that a missing one is a line, no traceback."""

import importlib
from typing import Any

from megapar.config.errors import UserError


def package(name: str) -> Any:
    """The module of that name. Raises UserError, with the remedy, where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = f"this experiment needs {name}, which is not installed ({error}); pip install 'megapar[experiments]'"
        raise UserError(missing) from None
