"""Slices of tensors in a safetensors file, with little of the file in memory at any time."""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

MOST = 64_000_000  # bytes that are read before what is mapped of the file is let go of


class Slices:
    """A file that is read in slices. Raises OSError and SafetensorError, also when it is made.

    The file is mapped, and each page that has been read counts as this process's memory until it is unmapped.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._read = path, 0
        self._file: Any = safe_open(path, framework="pt")
        self._names = set(self._file.keys())

    def facts(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype (as safetensors names it) of a tensor."""
        found = self._file.get_slice(name)
        return tuple(found.get_shape()), found.get_dtype()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def read(self, name: str, index: tuple[slice, ...], out: Tensor, *, transposed: bool = False) -> int:
        """Write a slice of a tensor (transposed: turned over) to `out`, in its dtype. Returns the bytes of the file."""
        if self._read > MOST:
            self._file, self._read = safe_open(self.path, framework="pt"), 0
        part = self._file.get_slice(name)[index]
        out.copy_(part.t() if transposed else part)
        size = part.numel() * part.element_size()
        self._read += size
        return size
