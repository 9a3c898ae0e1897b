"""Compile kernels for GPUs that are not here, and read figures off the machine code. Each in a process of its own."""

import multiprocessing
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megapar.config.errors import ConfigError, UserError
from megapar.cores import num_cores
from megapar.inspect import amdgcn, sass
from megapar.kernels import INTERPRET, interprets
from megapar.kernels.registry import KERNELS, compiled
from megapar.launch.local import environment_with

if TYPE_CHECKING:
    from megapar.kernels._common import Launch

# Bytes of shared memory that one thread block may have. The compiler does not check it: only a launch would.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TARGETS = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Spec:
    """One kernel to compile: what a launch would give the compiler."""

    name: str
    module: str  # that defines it
    function: str
    target: str
    types: dict[str, str]
    constants: dict[str, Any]
    divisible: list[str]
    options: dict[str, Any]

    def batch_entry(self) -> dict[str, Any]:
        """As one entry of the JSON that sass_report.py reads, for the NVIDIA targets."""
        path = Path(str(import_module(self.module).__file__))
        return {
            "kernel": f"{path}:{self.function}",
            "target": f"cuda:{self.target.removeprefix('sm_')}",
            "name": self.name,
            "signature": self.types,
            "constexprs": self.constants,
            "options": self.options,
            "divisible": self.divisible,
        }


@dataclass(frozen=True)
class Figures:
    """What the machine code of one kernel shows."""

    name: str
    target: str
    error: str | None = None  # the compiler's, and no figures then
    registers: int = 0
    spill_bytes: int = 0  # of one thread
    shared_bytes: int = 0
    warps: int = 0
    mma: str = ""  # the tensor core instruction, "" for none
    widest_load: int = 0  # bits of one thread's, or 1024 for TMA
    loop: dict[str, int] = field(default_factory=dict)  # instructions of the hottest loop by unit
    cycles: dict[str, float] = field(default_factory=dict)
    perfect: float | None = None
    serial: float | None = None
    limit: str = ""
    overlap: float | None = None
    lockstep: float | None = None

    @property
    def shared_limit(self) -> int:
        return SHARED_LIMIT[self.target]


TMA_BITS = 1024


def choose(key: str, names: list[str] | None, known: Collection[str]) -> list[str]:
    """The names that a configuration's list chooses; None: all. Raises ConfigError for none, and for an unknown one."""
    names = list(known) if names is None else names
    if not names:
        raise ConfigError(key, names, f"nothing to do; use {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ConfigError(key, name, f"unknown; use {', '.join(known)}")
    return names


def specs_of(kernels: list[str] | None, targets: list[str]) -> list[Spec]:
    """What the launchers of these kernels, None: of all, would compile on these targets.

    Raises UserError in a process whose Triton kernels are interpreted: they can't be compiled.
    """
    if interprets():
        raise UserError(f"kernels: {INTERPRET} is set, so Triton would interpret kernels; unset it to compile them")
    found = []
    for kernel in compiled() if kernels is None else kernels:
        specs = KERNELS[kernel].specs
        assert specs is not None, f"{kernel} has no specs"
        for target in targets:
            found += [spec_of(name, launch, target) for name, launch in specs(target).items()]
    return found


def spec_of(name: str, launch: "Launch", target: str) -> Spec:
    """What a launch, made for this target, gives the compiler."""
    function = launch.kernel.fn
    where = (function.__module__, function.__name__, target)
    return Spec(name, *where, *launch.specialisation(), launch.options)


def compile_all(specs: list[Spec]) -> list[Figures]:
    """Figures of every spec, in order. A compiler that crashes takes its own process with it and no other."""
    with environment_with({"OMP_NUM_THREADS": "1"}):
        with _pool(min(num_cores(), len(specs) or 1)) as pool:
            futures = [pool.submit(compile_one, spec) for spec in specs]
            try:
                return [future.result() for future in futures]
            except BrokenProcessPool:
                pass
        return [_alone(spec) for spec in specs]  # Triton's cache has what was compiled before the crash


def _pool(size: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(size, mp_context=multiprocessing.get_context("spawn"))


def _alone(spec: Spec) -> Figures:
    with _pool(1) as pool:
        try:
            return pool.submit(compile_one, spec).result()
        except BrokenProcessPool:
            return Figures(spec.name, spec.target, error="the compiler crashed")


def compile_one(spec: Spec) -> Figures:
    """Compile one kernel, or take it from Triton's cache, which goes by content, and read its figures."""
    try:
        found = compile_spec(spec)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Figures(spec.name, spec.target, error=f"{type(error).__name__}: {lines[-1] if lines else ''}")
    if spec.target.startswith("gfx"):
        return Figures(spec.name, spec.target, warps=found.metadata.num_warps, **amdgcn.figures(found))
    return Figures(spec.name, spec.target, **_nvidia(found, spec.target))


def compile_spec(spec: Spec) -> Any:
    """What Triton's compiler makes of a kernel: code by kind in `.asm`, `.metadata`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(spec.module), spec.function)
    names = kernel.arg_names
    signature = {name: spec.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in spec.divisible}
    source = ASTSource(
        kernel, signature, {name: spec.constants[name] for name in names if name in spec.constants}, attributes
    )
    if spec.target.startswith("gfx"):
        target = GPUTarget("hip", spec.target, 64)
    else:
        target = GPUTarget("cuda", int(spec.target.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=dict(spec.options))


def _nvidia(compiled: Any, target: str) -> dict[str, Any]:
    """Figures of a cubin."""
    text, resources = _disassemble(compiled.asm["cubin"])
    instructions, labels = sass.parse(text)
    warps = compiled.metadata.num_warps
    shapes = sass.tcgen05_shapes(instructions)
    loops = sass.innermost_loops(instructions, labels)
    found = [(loop, sass.bounds(loop, target, warps, shapes)) for loop in loops]
    count = Counter(instruction.unit for instruction in instructions)
    loads = [i.width * 8 for i in instructions if i.unit == "load" or i.opcode.startswith("LDGSTS")]
    figures = {
        "registers": resources["REG"],
        "spill_bytes": sum(i.width for i in instructions if i.opcode.startswith("STL")),
        "shared_bytes": compiled.metadata.shared,
        "warps": warps,
        "mma": next((".".join(i.opcode.split(".")[:2]) for i in instructions if i.unit == "mma"), ""),
        "widest_load": TMA_BITS if count["tma"] else max(loads, default=0),
    }
    rated = [(b.cycles["mma"], -len(loop.work), loop, b) for loop, b in found if b]
    hot = max(
        rated, key=lambda one: one[:2], default=None
    )  # full tiles, not the boundary's: least work beside the most
    if hot is None:
        busiest = max(loops, key=lambda loop: loop.count()["mma"], default=None)
        return figures | {"loop": dict((busiest.count() if busiest else count).most_common())}
    _, _, loop, b = hot
    return figures | {"loop": dict(loop.count().most_common())} | asdict(b)


def _disassemble(cubin: bytes) -> tuple[str, dict[str, int]]:
    """Machine code as text, and resource usage, by the tools that come with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    return text, {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", usage)}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
