"""`megapar bench kernels`: kernels by providers by shapes, as rows."""

import os
import pkgutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import torch

from megapar.bench import kernels as problems
from megapar.bench.config import BenchKernelsConfig
from megapar.bench.problem import MODES, Maker, Problem, Runner, Work
from megapar.bench.roofline import GPUS, least
from megapar.bench.rows import Kind, Row
from megapar.bench.timing import Quantiles, peak_mb, time_ms
from megapar.config import ConfigError, UserError
from megapar.cores import num_cores
from megapar.inspect.compile import TARGETS, Figures, Spec, choose, compile_all, spec_of
from megapar.kernels import INTERPRET, has_triton, interprets, use_backend, use_tile_scheduler
from megapar.kernels.registry import FUNCTIONS
from megapar.kernels.shapes import MODELS
from megapar.launch.machine import cpu_model, package_version

# provider -> the package to install, for those that megapar does without
OWN_AND_TORCH = ("megapar", "torch", "torch_flash", "torch_cudnn", "torch_fp32")
PROVIDERS = dict.fromkeys(OWN_AND_TORCH) | {"flash_attn": "flash-attn", "liger_kernel": "liger-kernel"}
ANYWHERE = ("megapar", "torch")  # the others need a GPU, and are left out where they can't take a shape
# (where, sweep) -> shapes and tokens. On a CPU the short one takes a minute.
SWEEPS = {
    ("cpu", "short"): (["gpt2"], [128, 256, 512, 1024]),
    ("cpu", "full"): (list(MODELS), [64, 128, 256, 512, 1024, 2048]),
    ("cuda", "short"): (["llama-8b"], [1024, 2048, 4096, 8192]),
    ("cuda", "full"): (list(MODELS), [1024, 2048, 4096, 8192, 16384, 32768]),
    ("interpret", "short"): (["demo"], [64]),
    ("interpret", "full"): (["demo"], [64, 128, 256]),
}
SECONDS = 0.1  # of repetitions behind every median
TOKENS_COMPILED = 4096  # any number: it is no part of a compilation
Log = Callable[[str], None]


def benches() -> list[str]:
    """The kernels' functions that can be benchmarked: those whose kernel has a file of its name in `kernels/` here.
    Imports none of them."""
    written = {found.name for found in pkgutil.iter_modules(problems.__path__)}
    return [function for function, kernel in FUNCTIONS.items() if kernel.name in written]


def maker(function: str) -> Maker:
    """What makes the problem of a kernel's function: `BENCH` of the kernel's file. Imports the kernel, so the backend
    must have been chosen, see `use_backend`."""
    module = import_module(f"{problems.__name__}.{FUNCTIONS[function].name}")
    made: Maker = module.BENCH[function]
    return made


@dataclass(frozen=True)
class Point:
    """One kernel at one shape."""

    kernel: str
    shape: str
    dtype: str
    tokens: int  # 0 where a figure is the same for any number

    def problem(self, device: str) -> Problem:
        return maker(self.kernel)(MODELS[self.shape], self.tokens, self.dtype, device)

    def work(self) -> dict[str, Work]:
        """By mode. What a launch moves and computes does not depend on the target."""
        found = {mode: plan.work(self.dtype) for mode, plan in self.problem("meta").plans("sm_90").items()}
        return found | {"full": found["forward"] + found["backward"]}


@dataclass(frozen=True)
class Bench:
    """What is to be run, understood and checked."""

    kernels: list[str]
    providers: list[str]
    modes: list[str]
    points: list[Point]
    device: str  # cpu or cuda
    interpret: bool
    targets: list[str]

    @property
    def shapes(self) -> list[tuple[str, str, str]]:
        """(kernel, shape, dtype)"""
        return list(dict.fromkeys((point.kernel, point.shape, point.dtype) for point in self.points))


def understand(config: BenchKernelsConfig, gpus: int, log: Log) -> Bench:
    """The benchmark that a config asks for on this machine. Raises ConfigError, UserError."""
    device = config.device if config.device != "auto" else "cuda" if gpus else "cpu"
    if device == "cuda" and not gpus:
        raise ConfigError("device", "cuda", "no GPU is visible; use cpu")
    interpret = config.kernels.backend == "interpret"
    where = "interpret" if interpret else device
    names, tokens = SWEEPS[where, config.sweep]
    lists: dict[str, list[str] | None] = {
        "kernel": config.kernel,
        "provider": config.provider or [name for name in OWN_AND_TORCH if name in ANYWHERE or device == "cuda"],
        "mode": config.mode,
        "shape": config.shape or names,
        "targets": config.targets,
    }
    known: dict[str, Collection[str]] = {
        "kernel": benches(),
        "provider": PROVIDERS,
        "mode": MODES,
        "shape": MODELS,
        "targets": TARGETS,
    }
    chosen = {key: choose(key, names, known[key]) for key, names in lists.items()}
    tokens = config.tokens or tokens
    if min(tokens) < 1:
        raise ConfigError("tokens", config.tokens, "must be at least 1 each")
    _choose_backend(config.kernels.backend, device)
    use_tile_scheduler(config.kernels.tile_scheduler)
    providers = _usable(chosen["provider"], device, log)
    points = [
        Point(kernel, shape, config.dtype or MODELS[shape].dtype, count)
        for kernel, shape, count in product(chosen["kernel"], chosen["shape"], sorted(set(tokens)))
    ]
    modes = [mode for mode in MODES if mode in chosen["mode"]]
    return Bench(chosen["kernel"], providers, modes, points, device, interpret, chosen["targets"])


def _choose_backend(backend: str, device: str) -> None:
    if not has_triton():
        raise UserError("bench kernels: Triton is not installed, and the kernels are written in it; pip install triton")
    if backend == "torch":
        raise ConfigError("kernels.backend", backend, "provider=[torch] is plain torch; use auto, triton or interpret")
    if backend == "triton" and device != "cuda":
        raise ConfigError("kernels.backend", backend, "compiled Triton kernels need a GPU; use auto, or interpret")
    if backend == "interpret" and device != "cpu":
        raise ConfigError("kernels.backend", backend, "interpreted kernels are for a CPU; add device=cpu")
    if backend != "interpret" and interprets():
        raise UserError(f"bench kernels: {INTERPRET} is set; unset it, or say kernels.backend=interpret")
    try:
        use_backend(backend)
    except ValueError as error:
        raise UserError(str(error)) from None


def _usable(providers: list[str], device: str, log: Log) -> list[str]:
    """Those that can run here; the others get a line each."""
    found, missing = [], []
    for provider in providers:
        package = PROVIDERS[provider]
        if package is not None and find_spec(provider) is None:
            missing.append(f"{provider}: not installed, left out; pip install {package}")
        elif provider not in ANYWHERE and device != "cuda":
            missing.append(f"{provider}: needs a GPU, left out")
        else:
            found.append(provider)
    if not found:
        raise UserError(f"provider={missing[0].replace(', left out', '')}; or use megapar, torch")
    for line in missing:
        log(line)
    return found


def run(bench: Bench, log: Log) -> Iterator[Row]:
    """All rows: the roofline, what our kernels' machine code shows where there is no GPU, what was timed."""
    timed = [name for name in bench.providers if name != "megapar" or bench.device == "cuda" or bench.interpret]
    if timed and bench.device == "cpu" and os.getloadavg()[0] > 0.5 * num_cores():
        log("other processes keep this machine's cores busy: what is timed on them comes out too slow")
    yield from _roofline(bench)
    if timed != bench.providers:
        yield from _machine_code(bench, log)
    for kernel, shape, dtype in bench.shapes if timed else ():
        log(f"{kernel}, {shape}, {dtype}: {', '.join(timed)}")
        for point in bench.points:
            if (point.kernel, point.shape, point.dtype) == (kernel, shape, dtype):
                for provider in timed:
                    yield from _measure(bench, point, provider, log)


# ---------------------------------------------------------------------------------------------------- what is computed


def _roofline(bench: Bench) -> Iterator[Row]:
    for point in bench.points:
        for mode, work in point.work().items():
            if mode not in bench.modes:
                continue
            row = partial(_row, point, "roofline", mode, kind="static")
            yield row("flops", "FLOP", work.flops)
            yield row("bytes", "B", work.bytes)
            yield row("intensity", "FLOP/B", work.flops / work.bytes)
            for gpu in GPUS:
                found = least(work, gpu)
                yield row("compute_time", "ms", found.compute_ms, device=gpu.name)
                yield row("memory_time", "ms", found.memory_ms, device=gpu.name)
                yield row("least_time", "ms", found.ms, device=gpu.name, note=found.bound)


def _machine_code(bench: Bench, log: Log) -> Iterator[Row]:
    """Figures of our kernels' machine code, as `megapar kernels` reads it, for the shapes of this benchmark."""
    places: list[tuple[Point, str]] = []
    specs: list[Spec] = []
    for (kernel, shape, dtype), target in product(bench.shapes, bench.targets):
        point = Point(kernel, shape, dtype, TOKENS_COMPILED)
        for mode, plan in point.problem("meta").plans(target).items():
            if mode in bench.modes or "full" in bench.modes:
                specs += [spec_of(launch.kernel.fn.__name__, launch, target) for launch in plan.launches]
                places += [(point, mode)] * len(plan.launches)
    log(f"compiling {len(specs)} kernels for {', '.join(bench.targets)}; Triton's cache keeps them")
    for (point, mode), figures in zip(places, compile_all(specs), strict=True):
        if figures.error:
            log(f"{point.kernel} on {figures.target}: {figures.error}")
            continue
        for metric, unit, value in _figures(figures):
            row = partial(_row, replace(point, tokens=0), "megapar", mode, kind="static")
            yield row(metric, unit, value, device=figures.target, note=figures.name)


def _figures(figures: Figures) -> Iterator[tuple[str, str, float]]:
    yield "registers", "per thread", figures.registers
    yield "spill", "B per thread", figures.spill_bytes
    yield "shared_memory", "B per block", figures.shared_bytes
    for metric, value in (("bound", figures.perfect), ("lockstep", figures.lockstep)):
        if value is not None:
            yield metric, "of tensor peak", value


# ---------------------------------------------------------------------------------------------------- what is measured


def _measure(bench: Bench, point: Point, provider: str, log: Log) -> list[Row]:
    """One provider at one shape, in every mode."""
    optional = provider not in ANYWHERE
    torch.manual_seed(0)
    try:
        problem = point.problem(bench.device)  # its own tensors: some kernels overwrite their inputs
        if provider not in problem.providers:
            return []
        runner = problem.providers[provider]()
        return [row for mode in bench.modes for row in _measure_mode(bench, point, provider, mode, runner)]
    except torch.OutOfMemoryError:
        problem_text = "out of memory"
    except Exception as error:
        if not optional:
            raise
        problem_text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    log(f"{provider}: {point.kernel}, {point.shape}, {point.tokens} tokens left out: {problem_text}")
    return []


def _measure_mode(bench: Bench, point: Point, provider: str, mode: str, runner: Runner) -> Iterator[Row]:
    if mode == "forward":
        call = runner.forward
    elif mode == "backward":
        kept = runner.forward()
        call = lambda: runner.backward(kept)  # noqa: E731
    else:
        call = lambda: runner.backward(runner.forward())  # noqa: E731
    interpreted = bench.interpret and provider == "megapar"
    kind: Kind = "interpreted" if interpreted else "measured"
    row = partial(_row, point, provider, mode, kind=kind, device=device_name(bench.device), note=runner.note)
    times = time_ms(call, bench.device, 1e-3 if interpreted else SECONDS)
    yield row("time", "ms", times)
    if interpreted:
        return
    work = point.work()[mode]
    if work.tensor_cores:
        yield row("tflops", "TFLOP/s", times.rate(work.flops / 1e9))
    yield row("gbps", "GB/s", times.rate(work.bytes / 1e6))
    yield row("memory", "MB", peak_mb(call, bench.device))


def _row(
    point: Point, provider: str, mode: str, metric: str, unit: str, value: Quantiles | float, *,
    kind: Kind, device: str = "", note: str = "",
) -> Row:  # fmt: skip
    p50, p20, p80 = (value.p50, value.p20, value.p80) if isinstance(value, Quantiles) else (value, None, None)
    return Row(
        point.kernel, provider, mode, metric, unit, point.tokens or None, p50, p20, p80, device, versions(provider),
        kind, point.shape, point.dtype, note,
    )  # fmt: skip


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def versions(provider: str) -> str:
    packages = ["megapar", "torch", "triton", *filter(None, [PROVIDERS.get(provider)])]
    return " ".join(f"{name} {package_version(name)}" for name in packages)
