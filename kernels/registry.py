"""The kernels there are: every file in `kernels/` that declares a `KERNEL`, found by itself.

A declaration is read from the file's text, and the file is not run: the configuration must know every kernel without
importing torch or Triton, and Triton reads whether to interpret when a kernel is defined.
"""

import ast
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megapar.kernels._common import Launch

PACKAGE = "megapar.kernels"
DTYPES = {"torch.float64": "fp64", "torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}


@dataclass(frozen=True)
class Kernel:
    """What a kernel's file says of itself. Every argument but `specs` is written out, as a string, a number or a tuple.

    name: the file's, with its folder: `comm.matmul`
    torch, triton: the forms there are
    functions: those that choose between them at each call, see `backend_of`; default: one of this name, none without a
        form in torch
    devices, dtypes: where the Triton form runs compiled, and what it takes
    specs: what `megapar kernels` compiles: an architecture's launches by name, on tensors without storage
    place: in lists; those that leave it out come last, by name
    """

    name: str
    torch: bool = True
    triton: bool = True
    functions: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cuda",)
    dtypes: tuple[str, ...] = ("fp32", "bf16", "fp16")
    specs: "Callable[[str], dict[str, Launch]] | None" = None
    place: float = float("inf")

    def __post_init__(self) -> None:
        if self.torch and not self.functions:
            object.__setattr__(self, "functions", (self.name,))

    @property
    def backends(self) -> tuple[str, ...]:
        return ("torch",) * self.torch + ("triton", "interpret") * self.triton

    def takes(self, dtype: object) -> bool:
        """Whether the Triton form takes a dtype: torch's, or the name of one (bf16)."""
        return name_of(dtype) in self.dtypes


def name_of(dtype: object) -> str:
    """bf16 of torch.bfloat16, and of itself."""
    return DTYPES.get(str(dtype), str(dtype))


def find(folders: Iterable[str]) -> dict[str, Kernel]:
    """The kernels of these folders by name. Imports none. Raises ValueError for a declaration that can't be read."""
    found = sorted(_declared(folders, ""), key=lambda kernel: (kernel.place, kernel.name))
    return {kernel.name: kernel for kernel in found}


def by_function(kernels: Iterable[Kernel]) -> dict[str, Kernel]:
    """The kernel of each function that chooses between forms. Raises ValueError where two kernels have one."""
    found: dict[str, Kernel] = {}
    for kernel in kernels:
        for function in kernel.functions:
            if found.setdefault(function, kernel) is not kernel:
                raise ValueError(f"{PACKAGE}: {found[function].name} and {kernel.name} both declare {function}")
    return found


def compiled() -> list[str]:
    """The kernels of which `megapar kernels` compiles something."""
    return [name for name, kernel in KERNELS.items() if kernel.specs is not None]


def _declared(folders: Iterable[str], prefix: str) -> Iterator[Kernel]:
    """The kernels in these folders and, but for those of a folder that is one kernel, in the folders inside."""
    for found in pkgutil.iter_modules(folders):
        spec: Any = found.module_finder.find_spec(found.name, None)
        kernel = _read(prefix + found.name, spec.loader.get_source(found.name))
        if kernel is not None:
            yield kernel
        elif found.ispkg:
            yield from _declared(spec.submodule_search_locations, f"{prefix}{found.name}.")


def _read(name: str, source: str) -> Kernel | None:
    """What a file's text declares; None if nothing."""
    start = re.search(r"^KERNEL\b[^=\n]*=", source, re.MULTILINE)
    if start is None:
        return None
    try:
        statement: Any = ast.parse(source[start.start() :]).body[0]
        arguments = [ast.literal_eval(value) for value in statement.value.args]
        options: dict[str, Any] = {
            one.arg: partial(_specs, name) if one.arg == "specs" else ast.literal_eval(one.value)
            for one in statement.value.keywords
        }
        kernel = Kernel(*arguments, **options)
    except (AttributeError, SyntaxError, TypeError, ValueError) as error:
        problem = "but for specs its arguments must be written out, since it is read without running the file"
        raise ValueError(f"{PACKAGE}.{name}: KERNEL can't be read ({error}); {problem}") from None
    if kernel.name != name:
        raise ValueError(f"{PACKAGE}.{name}: KERNEL's name is {kernel.name}; use the file's, {name}")
    return kernel


def _specs(name: str, arch: str) -> "dict[str, Launch]":
    return importlib.import_module(f"{PACKAGE}.{name}").KERNEL.specs(arch)


# Found at once, not at the first question: that may be asked while torch.compile traces.
KERNELS = find(importlib.import_module(PACKAGE).__path__)
FUNCTIONS = by_function(KERNELS.values())
