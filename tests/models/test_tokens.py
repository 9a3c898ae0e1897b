"""What layers are told of the tokens of a micro-batch."""

from itertools import pairwise

import torch

from megapar.mesh import Mesh
from megapar.models.tokens import Tokens
from megapar.parallel.attend import attend_
from megapar.parallel.context import StageContext
from megapar.parallel.rotary import Rotary


def test_coordinates() -> None:
    batch = {"ids": torch.zeros(2, 3, dtype=torch.int64), "samples": torch.tensor([7, 4]), "step": torch.tensor(5)}
    tokens = Tokens.of(batch, StageContext(Mesh()))
    assert (tokens.count, tokens.length, tokens.step, tokens.starts) == (6, 3, 5, None)
    assert tokens.local_samples.tolist() == [7, 7, 7, 4, 4, 4]
    assert tokens.local_positions.tolist() == [0, 1, 2, 0, 1, 2]


def test_a_rope_table_is_made_once() -> None:
    """One for each (length, channels, base), however many layers and forwards ask for it."""
    context = StageContext(Mesh(), torch.float64)
    first = Tokens(context, torch.tensor([0]), 8, 1)
    table, length = first.rope_table(Rotary(4, 10000.0))
    assert table.shape == (8, 4) and table.dtype == torch.float64 and length == 8
    assert Tokens(context, torch.tensor([3]), 8, 2).rope_table(Rotary(4, 10000.0))[0] is table
    assert first.rope_table(Rotary(4, 500000.0))[0] is not table


def test_packed_sequences_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(12, (4 + 2 * 2) * 4, dtype=torch.float64)
    ends = [0, 2, 6, 9, 12]
    starts = torch.tensor(ends, dtype=torch.int32)
    found = attend_(qkv.clone(), 4, 2, 6, starts=starts)
    for start, end in pairwise(ends):
        alone = attend_(qkv[start:end].clone(), 4, 2, end - start)
        torch.testing.assert_close(found[start:end], alone, rtol=1e-12, atol=1e-12)
