"""`experiments/interpret_induction`: what its samples are, and its smoke form up to the README's table."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.interpret_induction import data, results
from tests.finetune.test_finetune import megapar


def test_a_sample_ends_in_a_copy_and_has_no_other() -> None:
    """Not of one length or at one place, and not the same in both splits."""
    places = set()
    for number in range(50):
        tokens, count = data.repeated("train", number, 48)
        assert 12 <= count <= 24 and np.array_equal(tokens[-count:], tokens[-2 * count : -count])
        assert not np.array_equal(tokens, data.repeated("valid", number, 48)[0])
        places.add(count)
    assert len(places) > 8
    assert np.array_equal(data.repeated("valid", 3, 48)[0], data.repeated("valid", 3, 48)[0])


def test_what_a_head_sees() -> None:
    """Of two samples, whose queries are copied from different places."""
    weights = torch.zeros(1, 2, 6, 1, 6)
    weights[0, 0, 4, 0, 2] = weights[0, 1, 5, 0, 4] = 1.0
    copied = torch.tensor([[0, 1], [4, 5]])
    assert results.seen_at(weights, copied, torch.tensor([[-2], [-1]])).tolist() == [[1.0]]
    assert results.seen_at(weights, copied, torch.tensor([[-2], [-2]])).tolist() == [[0.5]]


@pytest.mark.more
def test_the_smoke_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = results.README.read_text(encoding="utf-8")
    [words] = [shlex.split(line) for line in re.findall(r"^megapar (.*runs/smoke.*)$", text, re.M)]
    megapar(tmp_path, *words)
    monkeypatch.setattr(results, "SAMPLES", 8)
    copy = tmp_path / "README.md"
    copy.write_text(text, encoding="utf-8")
    assert results.main([str(tmp_path / "runs" / "smoke"), "--readme", str(copy)]) == 0
    written = copy.read_text(encoding="utf-8")
    assert len(re.findall(r"^\| [01]\.[0-3] \| [\d.]+% \| [\d.]+% \| [\d.]+ \| [+-][\d.]+ \|$", written, re.M)) == 8
    said = r"^Induction heads: .*, the same in single, tp2, pp2, whose figures differ by at most (\S+)\. Without "
    head = re.search(said, written, re.MULTILINE)
    assert head is not None and float(head[1]) < 1e-12
