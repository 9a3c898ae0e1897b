"""A probe reads what is there and nothing else; docs/interpretability.md runs as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import megapar
from megapar.config.errors import UserError
from tests.library.models import batch, ours

PAGE = (Path(__file__).parents[2] / "docs" / "interpretability.md").read_text(encoding="utf-8")


def test_a_probe_reads_what_is_there() -> None:
    """Which token a place has, in the stream that begins with its embedding; not whether the sample's number is odd."""
    model, (ids, _) = ours("llama", hidden=64, init_std=0.5), batch(samples=80)
    with megapar.capture(model, ["embedding"]) as seen, torch.no_grad():
        model(ids)
    x = seen["embedding"].flatten(0, 1)
    there = megapar.linear_probe(x, (ids < 30).long().flatten())
    assert there.held_out > 0.95 and there.control < 0.65 < there.learned
    absent = megapar.linear_probe(x, (torch.arange(80) % 2).repeat_interleave(8))
    assert absent.held_out < 0.65
    assert megapar.linear_probe(x, (ids < 30).long().flatten()) == there


def test_what_is_refused() -> None:
    x = torch.randn(8, 3)
    for rows, labels, problem in (
        (x[None], torch.zeros(8).long(), r"x \[1, 8, 3\], labels \[8\]; give \[n, C\] and \[n\]"),
        (x, torch.zeros(7).long(), r"labels \[7\]"),
        (x, torch.zeros(8).long(), r"two classes among the others; give more rows"),
    ):
        with pytest.raises(UserError, match=problem):
            megapar.linear_probe(rows, labels)
    rows, labels = torch.randn(40, 3), torch.arange(40) % 2
    changed: list[tuple[dict[str, Any], str]] = [
        ({"x": rows.index_fill(0, torch.tensor([3]), torch.inf)}, r"x has 3 values that are not finite"),
        ({"x": rows[:, :0]}, r"0 columns; give int64 labels, 1 column or more"),
        ({"labels": labels / 2}, r"labels of torch.float32"),
        ({"labels": labels.tolist()}, r"give x and labels as tensors"),
        ({"labels": (torch.arange(40) == 7).long()}, r"one class is too rare|two classes among the others"),
        *(({key: value}, rf"{key}={value}") for key, value in (("held_out", 1.5), ("penalty", 0.0), ("seed", -1))),
    ]
    for changes, problem in changed:
        with pytest.raises(UserError, match=rf"^linear_probe: .*({problem})"):
            megapar.linear_probe(**{"x": rows, "labels": labels, **changes})


def test_the_page_runs_as_it_stands() -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    lines, compared = code.splitlines(), 0
    names: dict[str, Any] = {}
    exec(compile("\n".join(lines), "docs/interpretability.md", "exec"), names)
    for line in lines:
        expression, _, comment = line.partition("#")
        if shape := re.match(r" \[([\d, ]+)\]", comment):
            found = eval(expression, names)
            for one in found if isinstance(found, tuple) else [found]:
                assert list(one.shape) == [int(size) for size in shape[1].split(", ")], line
                compared += 1
    assert compared == 5
