"""Files that others may read too: whole or not at all, with the modes that the umask leaves."""

import os
import stat
import tempfile
from pathlib import Path

from megapar.config.errors import UserError


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and never a part.

    A device or FIFO is written to, and not replaced. Raises UserError, as on a full disk.
    """
    try:
        if path.exists() and special(path):
            path.write_text(text, encoding="utf-8")
        else:
            _write_atomic(path, text)
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); make room or choose another folder") from None


def _write_atomic(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        follow_umask(temporary)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def special(path: Path) -> str | None:
    """What a path is that is neither a file nor a folder, of which a reader may wait for ever. Raises OSError."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return None
    return "FIFO" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"


def follow_umask(path: str | Path) -> None:
    """Give a file the mode that `open` gives: some libraries, and `tempfile`, close theirs to everyone else."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
