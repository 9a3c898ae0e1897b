"""A writer of token files goes on where an interrupted one was, whatever that left half done."""

from pathlib import Path

import numpy as np
import pytest

from megapar.data.indexed import IndexedTokens, IndexedWriter, write_indexed

DOCUMENTS = [np.arange(size) for size in (3, 0, 7, 1, 0, 5)]


@pytest.mark.parametrize("lost", range(0, 40, 3))
@pytest.mark.parametrize("ending", [".bin", ".lengths"])
def test_it_goes_on(ending: str, lost: int, tmp_path: Path) -> None:
    """`lost`: bytes at the end of a file that never reached the disk."""
    write_indexed(tmp_path / "whole", DOCUMENTS, np.uint16)
    first = IndexedWriter(tmp_path / "c", np.uint16)
    first.add(DOCUMENTS[:3])
    first.add(DOCUMENTS[3:5])
    first.close()
    path = tmp_path / f"c{ending}"
    path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - lost)])
    second = IndexedWriter(tmp_path / "c", np.uint16)
    assert second.documents <= 5 and (lost or second.documents == 5)
    second.add(DOCUMENTS[second.documents :])
    assert second.finish() == len(DOCUMENTS)
    second.close()
    for end in (".bin", ".idx"):
        assert (tmp_path / f"c{end}").read_bytes() == (tmp_path / f"whole{end}").read_bytes()
    assert IndexedTokens(tmp_path / "c").num_documents == len(DOCUMENTS)
