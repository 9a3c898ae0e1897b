"""Files that are none: what is read is refused at once, what is written to stays what it is."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapar.cli import main
from megapar.cli.output import show
from megapar.config.schema import DataConfig
from megapar.data.corpus import find_text
from megapar.data.indexed import write_indexed
from megapar.data.prepare import prepare
from megapar.data.tokenise import token_file_settings
from megapar.files import write_atomic
from megapar.schedule.costs import read_costs
from megapar.schedule.table import read


def tokenizer(path: str) -> Any:
    return token_file_settings(DataConfig(tokenizer=path), find_text(__file__))


@pytest.mark.parametrize("reader", [tokenizer, read, lambda path: read_costs(path, 2)])
def test_a_pipe_or_a_device_is_refused_at_once(reader: Callable, tmp_path: Path) -> None:
    """Of a FIFO the reader waited for ever, of /dev/zero until no memory was left."""
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((str(tmp_path / "pipe"), "FIFO"), ("/dev/null", "device")):
        with pytest.raises(Exception, match=f"{path}: is a ({kind}|FIFO or a device); write the "):
            reader(path)


def test_a_pipe_beside_token_files_is_no_tokenizer(tmp_path: Path) -> None:
    write_indexed(tmp_path / "mine", [np.arange(9)], np.uint16)
    os.mkfifo(tmp_path / "mine.model")
    assert prepare(DataConfig(path=str(tmp_path / "mine"))).tokenizer_path is None


def test_a_device_or_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_atomic(pipe, "text")
    reader.join(timeout=10)
    assert got == ["text"] and pipe.is_fifo()


def test_a_result_is_no_failure_where_nobody_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `megapar train ... | head`: a finished run, or a point of a sweep, was reported as failed."""
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        show("more")
        show("and more")
        monkeypatch.undo()


def test_a_table_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", f"pipeline.schedule=csv:{tmp_path}/none", "stages=2", "microbatches=4"]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "none: not readable as a table: No such file" in said
