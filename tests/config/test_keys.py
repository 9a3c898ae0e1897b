"""The facts of a key stand beside it, and everything that asks for them finds them there."""

from dataclasses import dataclass

import pytest

from megapar.config.errors import ConfigError
from megapar.config.keys import Option, changed, check_values, group, keys, option
from megapar.config.parse import nearest


@dataclass(frozen=True)
class Below:
    rate: float = option(0.5, "a share", at_least=0, below=1, also=("share",))


@dataclass(frozen=True)
class Example:
    below: Below = group(Below, "a group")
    sizes: list[float] | None = option([1.0], "some sizes", above=0)
    name: str = option("x", "a text", empty="give a name", verbatim=True)


@pytest.mark.parametrize(
    ("facts", "value", "problem"),
    [
        ({"at_least": 1}, 0, "must be at least 1"),
        ({"at_least": 1}, 1, None),
        ({"above": 0}, 0.0, "must be more than 0"),
        ({"above": 0}, 1e-9, None),
        ({"at_most": 2**63 - 1}, 2**63, f"must be at most {2**63 - 1}"),
        ({"at_least": 0, "below": 1}, 1.0, "must be less than 1"),
        ({"at_least": 0, "below": 1}, -0.1, "must be at least 0"),
        ({"at_least": 1}, None, None),
        ({"at_least": 1}, False, None),
        ({"at_least": 1}, "text", None),
        ({"empty": "give one"}, "", "give one"),
        ({}, "", None),
    ],
)
def test_bounds(facts: dict, value: object, problem: str | None) -> None:
    assert Option("help", **facts).refusal(value) == problem


@pytest.mark.parametrize(
    ("key", "value"), [("below.rate", 1.0), ("sizes", [1.0, 0.0]), ("name", "")], ids=lambda value: str(value)
)
def test_a_value_out_of_bounds_is_named(key: str, value: object) -> None:
    check_values(Example())
    check_values(changed(Example(), {"sizes": None}))
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        check_values(changed(Example(), {key: value}))


def test_what_other_programs_call_a_key_is_suggested() -> None:
    assert nearest("share", Example) == "below.rate"
    assert [key for key, facts in keys(Example).items() if facts.verbatim] == ["name"]
