"""What a policy is rewarded for: a function of the user's own, whose mistakes become one line."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megapar.config.errors import ConfigError, UserError
from megapar.config.found import find_function
from megapar.data.sources.prompts import Prompt

MOST = 200  # characters of a completion in a message, and of what a function raised or gave
LARGEST = 1e100  # of a reward's size


@dataclass(frozen=True)
class Reward:
    """name: `reward`; function: (prompt, completion, record) -> number"""

    name: str
    function: Callable[[str, str, dict[str, Any]], Any]

    def __call__(self, prompt: Prompt, completion: str) -> float:
        """Raises UserError, with file and line of the prompt, where it raises or gives no finite number."""
        record = dict(prompt.values)
        try:
            found = self.function(record["prompt"], completion, record)
        except (Exception, SystemExit) as error:  # whatever a function of the user's own may raise
            problem = f"raised {type(error).__name__}: {_short(str, error)}"
            raise self._wrong(prompt, completion, problem) from error
        try:
            value = math.nan if isinstance(found, str | bytes) else float(found)
        except Exception:
            value = math.nan
        if not math.isfinite(value):
            raise self._wrong(prompt, completion, f"gave {_short(repr, found)}, which is no finite number")
        if abs(value) > LARGEST:
            problem = f"gave {value:.3g}, whose squares can't be added up; give at most {LARGEST:.0e}"
            raise self._wrong(prompt, completion, problem)
        return value

    def _wrong(self, prompt: Prompt, completion: str, problem: str) -> UserError:
        shown = _short(repr, completion)
        return UserError(f"{prompt.where}: reward={self.name} {problem}; the completion was {shown}")


def _short(said: Callable[[Any], str], of: Any) -> str:
    """What a value of the user's own says of itself, in one line of at most MOST characters."""
    try:
        words = " ".join(said(of).split())
    except Exception as error:
        return f"a {type(of).__name__} that can't be shown ({type(error).__name__})"
    return words if len(words) <= MOST else words[:MOST] + "..."


def find_reward(name: str) -> Reward:
    """The function of that name. Raises ConfigError where there is none that takes three arguments."""
    function = find_function("reward", name, "my_reward:reward", "a function of (prompt, completion, record)")
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        kind = "a generator" if inspect.isgeneratorfunction(function) else "async"
        raise ConfigError("reward", name, f"is {kind}, which gives no number; make it an ordinary function")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        problem = f"can't be called with (prompt, completion, record): {error}; make it take these"
        raise ConfigError("reward", name, problem) from None
    except ValueError:  # some of C have no signature
        pass
    return Reward(name, function)
