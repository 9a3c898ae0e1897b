"""Text on disk as documents: one file is one document, and a large file is cut at line ends."""

import codecs
import os
import sysconfig
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from megapar.config.errors import ConfigError
from megapar.files import special

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
    skipped  what is left out, by name, and why; files that are no UTF-8 text once `keep_text` ran
    """

    kind: str
    name: str
    root: Path
    files: list[TextFile]
    skipped: dict[str, str] = field(default_factory=dict)
    _checked: bool = field(default=False, repr=False)

    def listing(self) -> list[tuple[str, tuple[int, int, int]]]:
        """(name, stamp) of each file: cheap to make, and different as soon as a file is."""
        return [(file.name, file.stamp) for file in self.files]

    def changed(self) -> bool:
        """Whether any listed file differs from its stamp on disk now."""
        return any(_stamp(file.path) != file.stamp for file in self.files)

    def keep_text(self) -> None:
        """Drop the files that are binary or not UTF-8. Raises ConfigError where nothing is left."""
        if not self._checked:
            kept = []
            for file in self.files:
                if (problem := _not_text(file.path)) is None:
                    kept.append(file)
                elif self.kind == "file":
                    raise ConfigError("data.path", file.path, problem)
                else:
                    self.skipped[file.name] = problem
            self.files, self._checked = kept, True
        if not any(file.stamp[0] for file in self.files):
            why = f" ({skipped_text(self.skipped)})" if self.skipped else ""
            raise ConfigError("data.path", self.root, f"no text in it{why}")

    def documents(self) -> Iterator[str]:
        """Non-empty documents, exactly as they stand in the files (line ends included)."""
        self.keep_text()
        for file in self.files:
            yield from _documents_of(file)


def skipped_text(skipped: Mapping[str, str], most: int = 3) -> str:
    """`2 skipped: a.bin (binary, not text), notes (hidden)`, of no more than `most` names."""
    names = [f"{name} ({problem})" for name, problem in list(skipped.items())[:most]]
    return f"{len(skipped)} skipped: {', '.join([*names, *(['...'] if len(skipped) > most else [])])}"


def counted(number: int, noun: str) -> str:
    """`1 document`, `1,200 documents`, `2 classes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def find_text(path: str, key: str = "data.path") -> TextSource:
    """List the text that `data.path`, or another key, names: a file, a folder or `stdlib`.

    A folder is read recursively, linked folders too, each real one once; hidden files and folders are left out.

    Raises ConfigError for that key where nothing readable is there.
    """
    if path == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        files = [file for file in _Walk(root, STDLIB_SKIPPED).files if _is_stdlib_source(file.path.name)]
        return TextSource(STDLIB, STDLIB, root, files)
    root = Path(path).expanduser()
    if root.is_dir():
        walk = _Walk(root, key=key)
        if not walk.files:
            why = f" ({skipped_text(walk.skipped)})" if walk.skipped else ""
            raise ConfigError(key, path, f"the folder has no files in it{why}")
        return TextSource("folder", root.resolve().name or "root", root, walk.files, walk.skipped)
    if not root.exists():
        half = [end for end in (".bin", ".idx") if os.path.exists(f"{path}{end}")]
        problem = (
            f"{path}{half[0]} exists, but not its partner" if half else "no such file, folder or PREFIX of .bin/.idx"
        )
        raise ConfigError(key, path, problem)
    if kind := special(root):
        raise ConfigError(key, path, f"is a {kind}; text is read more than once: write it to a file")
    return TextSource("file", root.name, root, [TextFile(root.name, root, _stamp(root))])


def _is_stdlib_source(name: str) -> bool:
    return name.endswith(".py") and not name.startswith("_sysconfigdata")  # that one holds this machine's paths


class _Walk:
    """The regular files below a folder, in the order of their names, and what is left out. Raises ConfigError.

    Links to folders are followed after the folders themselves, so that a file has the name of its own folder if that is
    below `root`.
    """

    def __init__(self, root: Path, without: Container[str] = (), key: str = "data.path") -> None:
        self.root, self.without, self.key = root, without, key
        self.skipped: dict[str, str] = {}
        self._found: list[TextFile] = []
        self._read: dict[tuple[int, int], str] = {}  # folders, by device and inode
        links = [root]
        while links:
            links = sorted(link for folder in links for link in self._folder(folder))
        self.files = sorted(self._found, key=lambda file: file.name)
        self.skipped = dict(sorted(self.skipped.items()))

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _folder(self, top: Path) -> list[Path]:
        """Read a folder and those below it. Returns the links to folders in them."""
        links = []
        for folder, folders, names in os.walk(top, onerror=self._refuse):
            here, info = Path(folder), os.stat(folder)
            if (known := self._read.setdefault((info.st_dev, info.st_ino), self._name(here))) != self._name(here):
                self.skipped[self._name(here)] = f"a link to a folder that is read as {known}"
                folders.clear()
                continue
            kept = []
            for name in sorted(folders):
                if name in self.without:
                    continue
                if name.startswith("."):
                    self.skipped[self._name(here / name)] = "hidden"
                elif (here / name).is_symlink():
                    links.append(here / name)
                else:
                    kept.append(name)
            folders[:] = kept
            for name in names:
                self._file(here / name)
        return links

    def _refuse(self, error: OSError) -> None:
        raise ConfigError(self.key, error.filename, f"can't be read: {error.strerror}")

    def _file(self, path: Path) -> None:
        if path.name.startswith("."):
            self.skipped[self._name(path)] = "hidden"
        elif not path.exists():
            self.skipped[self._name(path)] = "a link to nothing"
        elif kind := special(path):
            self.skipped[self._name(path)] = f"a {kind}"
        else:
            self._found.append(TextFile(self._name(path), path, _stamp(path)))


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
        at = offset + error.start
        return f"not UTF-8 text at offset {at}, in line {_lines(path, at)}; convert it first"
    except OSError as error:
        raise ConfigError("data.path", path, f"can't be read: {error.strerror}") from None
    return None


def _lines(path: Path, offset: int) -> int:
    """The number of the line, from 1 on, that the byte at an offset is in."""
    with open(path, "rb") as file:
        return 1 + sum(file.read(min(1 << 20, offset - at)).count(b"\n") for at in range(0, offset, 1 << 20))


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
