"""What counts as text, in which order, and what is refused."""

import os
from pathlib import Path

import pytest

from megapar.config.errors import ConfigError
from megapar.data.corpus import LARGE_FILE, PIECE, find_text


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "b\r\n",
        "a/z.py": "z",
        "a/c.md": "c",
        ".git/config": "no",
        ".hidden": "no",
        "e": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    source = find_text(str(tmp_path))
    assert [file.name for file in source.files] == ["a/c.md", "a/z.py", "b.txt", "e"]
    assert list(source.documents()) == ["c", "z", "b\r\n"]


def test_binaries_and_undecodable_files_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.bin").write_bytes(b"ab\0cd")
    (tmp_path / "c.txt").write_bytes("é".encode("latin-1"))
    source = find_text(str(tmp_path))
    assert list(source.documents()) == ["text"]
    assert source.skipped == {
        "b.bin": "binary, not text",
        "c.txt": "not UTF-8 text at offset 0, in line 1; convert it first",
    }


def test_linked_folders_are_read_once_each(tmp_path: Path) -> None:
    """Shards linked into a folder; loops, links to nothing and pipes are named."""
    for name in ("top/own/a.txt", "shards/1/b.txt", "shards/1/.cache/x", "shards/2/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    top = tmp_path / "top"
    (top / "again").symlink_to("own")  # sorts before what it names
    (top / "first").symlink_to("../shards/1")
    (top / "second").symlink_to(tmp_path / "shards/2")
    (top / "third").symlink_to(tmp_path / "shards/2")
    (tmp_path / "shards/2/up").symlink_to(top)
    (top / "nothing").symlink_to("nowhere")
    (top / "one.txt").symlink_to(tmp_path / "shards/1/b.txt")
    os.mkfifo(top / "pipe")
    source = find_text(str(top))
    assert [file.name for file in source.files] == ["first/b.txt", "one.txt", "own/a.txt", "second/c.txt"]
    assert source.skipped == {
        "again": "a link to a folder that is read as own",
        "first/.cache": "hidden",
        "nothing": "a link to nothing",
        "pipe": "a FIFO",
        "second/up": "a link to a folder that is read as .",
        "third": "a link to a folder that is read as second",
    }


def test_a_chain_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "t.txt").write_text("t")
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "around").symlink_to("around")
    source = find_text(str(tmp_path))
    assert [file.name for file in source.files] == ["a/t.txt"]
    assert source.skipped == {"a/self": "a link to a folder that is read as a", "around": "a link to nothing"}


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((str(tmp_path / "pipe"), "FIFO"), ("/dev/null", "device")):
        with pytest.raises(ConfigError, match=f"data\\.path={path}: is a {kind}; text is read more than once"):
            find_text(path)


def test_a_large_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = "".join(f"line {number} — with a dash\r\n" for number in range(60_000))
    path = tmp_path / "large.txt"
    path.write_bytes(text.encode())
    documents = list(find_text(str(path)).documents())
    assert path.stat().st_size > LARGE_FILE
    assert "".join(documents) == text
    assert len(documents) > 10
    assert all(document.endswith("\n") and PIECE <= len(document) < 2 * PIECE for document in documents[:-1])


def test_a_large_file_without_lines_is_cut_too(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text("é" * 700_000, encoding="utf-8")
    documents = list(find_text(str(tmp_path / "large.txt")).documents())
    assert "".join(documents) == "é" * 700_000
    assert max(map(len, documents)) == PIECE


def test_a_smaller_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n\ntwo\n")
    assert list(find_text(str(tmp_path / "a.txt")).documents()) == ["one\n\n\ntwo\n"]


def test_the_standard_library() -> None:
    source = find_text("stdlib")
    names = [file.name for file in source.files]
    assert "argparse.py" in names
    assert names == sorted(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "idlelib"} & set(name.split("/"))]
    assert sum(file.stamp[0] for file in source.files) > 5_000_000
    assert max(file.stamp[0] for file in source.files) < 500_000


@pytest.mark.parametrize(
    ("files", "path", "problem"),
    [
        ({}, "missing", "no such file"),
        ({}, "", "no files in it"),
        ({"a.txt": b""}, "a.txt", "no text"),
        ({"a.txt": b"", "b": b"\0"}, "", r"no text in it \(1 skipped: b \(binary"),
        ({"a.txt": b"\0\1"}, "a.txt", "binary"),
        ({"a.txt": b"abc\xff\xfe"}, "a.txt", "not UTF-8 text at offset 3"),
        ({"a.txt": b"a\nb\n\xff\n"}, "a.txt", "not UTF-8 text at offset 4, in line 3; convert it first"),
        ({"a.txt": b"a" * (1 << 20) + b"bc\xe2"}, "a.txt", f"not UTF-8 text at offset {(1 << 20) + 2}"),
        ({"c.bin": b"\0\1"}, "c", r"c\.bin exists, but not its partner"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, files: dict[str, bytes], path: str, problem: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"data\.path=.*{problem}"):
        list(find_text(os.path.join(tmp_path, path)).documents())


def test_a_change_is_noticed_even_with_the_old_mtime(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    info = path.stat()
    source = find_text(str(path))
    assert not source.changed()
    path.write_text("new")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert source.changed()
    assert find_text(str(path)).listing() != source.listing()
