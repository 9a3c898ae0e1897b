"""Text on disk as documents: one file is one document, and a large file is cut at line ends."""

import codecs
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megapar.config.errors import ConfigError

STDLIB = "stdlib"  # as `data.path`: a word, and never a file of that name
LARGE_FILE = 1_000_000  # bytes; a larger file is cut, so that some of it can be held out
PIECE = 65_536  # characters of such a document, up to the next line end
# The standard library without its tests, without what pip installs, and without tables that a program generated.
STDLIB_SKIPPED = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "pydoc_data",
}


@dataclass(frozen=True)
class TextFile:
    """One file of a source. `stamp` changes when the file does: (bytes, mtime in ns, ctime in ns)."""

    name: str
    path: Path
    stamp: tuple[int, int, int]


@dataclass
class TextSource:
    """The text that `data.path` names.

    kind     STDLIB, "file" or "folder"
    name     what to call it without saying where it lies
    files    in the order of their names, which is the order of the documents
    skipped  files left out because they are no UTF-8 text, once `keep_text` ran
    """

    kind: str
    name: str
    root: Path
    files: list[TextFile]
    skipped: int = 0
    _checked: bool = field(default=False, repr=False)

    def listing(self) -> list[tuple[str, tuple[int, int, int]]]:
        """(name, stamp) of each file: cheap to make, and different as soon as a file is."""
        return [(file.name, file.stamp) for file in self.files]

    def changed(self) -> bool:
        """Whether any listed file differs from its stamp on disk now."""
        return any(_stamp(file.path) != file.stamp for file in self.files)

    def keep_text(self) -> None:
        """Drop the files that are binary or not UTF-8 and count them. Raises ConfigError where nothing is left."""
        if not self._checked:
            kept = [file for file in self.files if not (problem := _not_text(file.path)) or self._refuse(file, problem)]
            self.skipped = len(self.files) - len(kept)
            self.files, self._checked = kept, True
        if not any(file.stamp[0] for file in self.files):
            raise ConfigError("data.path", self.root, f"no text in it ({self.skipped} binary or undecodable files)")

    def _refuse(self, file: TextFile, problem: str) -> bool:
        """A single file that is no text is an error; in a folder it is left out."""
        if self.kind == "file":
            raise ConfigError("data.path", file.path, problem)
        return False

    def documents(self) -> Iterator[str]:
        """Non-empty documents, exactly as they stand in the files (line ends included)."""
        self.keep_text()
        for file in self.files:
            yield from _documents_of(file)


def find_text(path: str) -> TextSource:
    """List the text that `data.path` names: a file, a folder (recursively, without hidden files) or `stdlib`.

    Raises ConfigError for `data.path` where nothing readable is there.
    """
    if path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return TextSource(STDLIB, STDLIB, root, _walk(root, STDLIB_SKIPPED, _is_stdlib_source))
    root = Path(path).expanduser()
    if root.is_dir():
        files = _walk(root, set(), lambda name: not name.startswith("."))
        if not files:
            raise ConfigError("data.path", path, "the folder has no files in it")
        return TextSource("folder", root.resolve().name or "root", root, files)
    if not root.exists():
        half = [end for end in (".bin", ".idx") if os.path.exists(f"{path}{end}")]
        problem = (
            f"{path}{half[0]} exists, but not its partner" if half else "no such file, folder or PREFIX of .bin/.idx"
        )
        raise ConfigError("data.path", path, problem)
    return TextSource("file", root.name, root, [TextFile(root.name, root, _stamp(root))])


def _is_stdlib_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith("_sysconfigdata")  # that one holds this machine's paths


def _walk(root: Path, skipped: set[str], wanted: Callable[[str], bool]) -> list[TextFile]:
    def refuse(error: OSError) -> None:
        raise ConfigError("data.path", error.filename, f"can't be read: {error.strerror}")

    found: list[TextFile] = []
    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if wanted(name) and path.exists() and stat.S_ISREG(path.stat().st_mode):
                found.append(TextFile(path.relative_to(root).as_posix(), path, _stamp(path)))
    return sorted(found, key=lambda file: file.name)


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        info = path.stat()
    except OSError:
        return (-1, 0, 0)
    # ctime too: a program can set the mtime back, but not the ctime.
    return (info.st_size, info.st_mtime_ns, info.st_ctime_ns)


def _not_text(path: Path) -> str | None:
    """Why a file is no text, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of what the decoder sees next: the chunk, with an unfinished character of the chunk before
    try:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                if offset == 0 and b"\0" in chunk[:8192]:
                    return "binary, not text"
                decoder.decode(chunk)
                offset = file.tell() - len(decoder.getstate()[0])
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return f"not UTF-8 text at offset {offset + error.start}; convert it first"
    except OSError as error:
        raise ConfigError("data.path", path, f"can't be read: {error.strerror}") from None
    return None


def _documents_of(file: TextFile) -> Iterator[str]:
    # newline="\n": no translation, "\r\n" stays.
    with open(file.path, encoding="utf-8", newline="\n") as lines:
        if file.stamp[0] <= LARGE_FILE:
            if text := lines.read():
                yield text
            return
        piece: list[str] = []
        size = 0
        while line := lines.readline(PIECE):
            piece.append(line)
            size += len(line)
            if size >= PIECE:
                yield "".join(piece)
                piece, size = [], 0
        if piece:
            yield "".join(piece)
