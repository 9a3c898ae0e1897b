"""Cases of attention, and what a process with interpreted kernels does with them."""

import ctypes
import importlib
import itertools
import math
import mmap
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megapar import kernels
from megapar.bench import kernels as benches
from megapar.kernels import attention as module
from megapar.kernels import registry, use_backend
from megapar.kernels.attention import attention
from megapar.kernels.attention.launch import CONFIGS, Config

NAMES = ("o", "lse", "dq", "dk", "dv", "dbias")  # the last where there is a bias
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Small, so that short sequences have full tiles and boundary tiles on both sides of them.
TILES = {
    "square": Config(32, 32, 16, 4, 1),
    "tma": Config(32, 16, 16, 4, 1, tma=True),
    "wide": Config(16, 64, 32, 4, 1),
    "one loop": Config(32, 0, 16, 4, 1),  # of the forward; the backward's are square
}
Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One call of attention. lengths: (S, L), or of packed sequences ((S, ...), (L, ...))."""

    dtype: str
    channels: tuple[int, int]  # D, E
    heads: tuple[int, int]  # N, K
    lengths: tuple[Any, Any]
    mask: tuple[bool, Any]  # causal, window
    softcap: float | None
    tiles: str
    bias: bool = field(default=False, repr=False)

    @property
    def packed(self) -> bool:
        return isinstance(self.lengths[0], tuple)

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"causal": self.mask[0], "window": self.mask[1], "softcap": self.softcap}
        if self.packed:
            options |= dict(zip(("cu_seqlens_q", "cu_seqlens_k"), map(starts, self.lengths), strict=True))
        return options


@dataclass(frozen=True)
class Outcome:
    """Of each of NAMES: the largest error and that of torch in the same dtype, and the largest value, in fp64."""

    error: dict[str, float]
    torch_error: dict[str, float]
    size: dict[str, float]


def starts(lengths: Lengths) -> Tensor:
    return torch.tensor([sum(lengths[:number]) for number in range(len(lengths) + 1)], dtype=torch.int32)


@contextmanager
def tiles(config: Config) -> Iterator[None]:
    """Every interpreted kernel takes these block sizes."""
    kept = dict(CONFIGS)
    for key in kept:
        if key[1] == "interpret":
            CONFIGS[key] = config if config.step or key[0] == "forward" else TILES["square"]
    try:
        yield
    finally:
        CONFIGS.update(kept)


def inputs(case: Case) -> list[Tensor]:
    """q, k, v, do, dlse, maybe bias in fp64 with values that the case's dtype holds; rows behind the packed sequences
    are NaN, and so are the bias's behind the longest of them."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    (n, k), (d, e), (s, length) = case.heads, case.channels, case.lengths
    rows, keys = ((sum(s) + 3,), (sum(length) + 2,)) if case.packed else ((2, s), (2, length))
    shapes = ((*rows, n, d), (*keys, k, d), (*keys, k, e), (*rows, n, e), (*rows, n))
    made = [torch.randn(shape, generator=generator).to(DTYPES[case.dtype]).double() for shape in shapes]
    if case.packed:
        for tensor, behind in zip(made, (3, 2, 2, 3, 3), strict=True):
            tensor[-behind:] = math.nan
    if case.bias:
        queries, there = (max(s), max(length)) if case.packed else (s, length)
        made.append(torch.randn(n, queries, there, generator=generator).to(DTYPES[case.dtype]).double())
    return made


def run(case: Case, backend: str, dtype: torch.dtype, given: list[Tensor]) -> list[Tensor]:
    """o, lse, dq, dk, dv, maybe dbias of a backend in a dtype. Memory that a kernel does not write holds NaN."""
    use_backend(backend)
    q, k, v, *bias = (tensor.to(dtype).requires_grad_() for tensor in (*given[:3], *given[5:]))
    o, lse = attention(q, k, v, bias=bias[0] if bias else None, return_lse=True, **case.options())
    gradients = torch.autograd.grad([o, lse], [q, k, v, *bias], [given[3].to(o.dtype), given[4].to(lse.dtype)])
    return [x.detach().double() for x in (o, lse, *gradients)]


def run_case(case: Case) -> Outcome:
    with poisoned_memory(), tiles(TILES[case.tiles]):
        given = inputs(case)
        exact = run(case, "torch", torch.float64, given)
        plain = run(case, "torch", DTYPES[case.dtype], given)
        found = run(case, "interpret", DTYPES[case.dtype], given)
    return Outcome(
        {name: distance(a, b) for name, a, b in zip(NAMES, found, exact, strict=False)},
        {name: distance(a, b) for name, a, b in zip(NAMES, plain, exact, strict=False)},
        {
            name: float(x.nan_to_num(0.0, 0.0, 0.0).abs().amax()) if x.numel() else 0.0
            for name, x in zip(NAMES, exact, strict=False)
        },
    )


def distance(found: Tensor, exact: Tensor) -> float:
    """Largest difference; inf where one is infinite or NaN and the other not."""
    if found.shape != exact.shape or not torch.equal(found.isfinite(), exact.isfinite()):
        return math.inf
    finite = exact.isfinite()
    if not torch.equal(found[~finite], exact[~finite]):
        return math.inf
    return float((found - exact)[finite].abs().max()) if finite.any() else 0.0


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors without values hold NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def guarded(like: Tensor, before: bool) -> Tensor:
    """A copy whose memory ends where a page begins that can't be touched; before: begins where such a page ends."""
    page, size = mmap.PAGESIZE, like.numel() * like.element_size()
    pages = -(-size // page)
    region = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    closed, first = (start, page) if before else (start + pages * page, pages * page - size)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer(region, dtype=like.dtype, count=like.numel(), offset=first).view(like.shape).copy_(like)


# ------------------------------------------------------- jobs: (rank, world_size, ...) in the interpreting processes


def refusal(rank: int, world_size: int, q: Tensor, v: Tensor) -> str:
    """What interpreted attention says against these."""
    use_backend("interpret")
    try:
        attention(q, q, v)
    except ValueError as error:
        return str(error)
    return "nothing"


def auto_backends(
    rank: int, world_size: int, dtype: str
) -> tuple[dict[str, dict[str, str]], dict[str, dict[str, str]]]:
    """By device the backends under auto: those that run (summary.json) and those foreseen (environment.json)."""
    use_backend("interpret")
    use_backend("auto")
    kind = torch.float64 if dtype == "fp64" else DTYPES[dtype]
    ran = {
        device: {kernel: kernels.backend_of(kernel, device, kind) for kernel in kernels.backends()}
        for device in ("cpu", "cuda")
    }
    return ran, {device: kernels.select_backends("auto", device, dtype) for device in ran}


def run_share(rank: int, world_size: int, chosen: list[Case]) -> list[tuple[Case, Outcome]]:
    """Every world_size-th case."""
    return [(case, run_case(case)) for case in chosen[rank::world_size]]


def run_one(rank: int, world_size: int, case: Case) -> Outcome:
    return run_case(case)


def repeat(rank: int, world_size: int, case: Case) -> bool:
    """Whether a second run gives the same bits."""
    with tiles(TILES[case.tiles]):
        given = inputs(case)
        first, second = (run(case, "interpret", DTYPES[case.dtype], given) for _ in range(2))
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True))


def isolated(rank: int, world_size: int, tile: str) -> list[bool]:
    """Of each packed sequence whether everything about it is finite, where the second one is full of NaN."""
    lengths = (21, 18, 37)
    case = Case("fp32", (32, 32), (2, 1), (lengths, lengths), (True, None), None, tile)
    given = [tensor[: sum(lengths)] for tensor in inputs(case)]
    for tensor in given:
        tensor[21:39] = math.nan
    with tiles(TILES[tile]):
        found = run(case, "interpret", torch.float32, given)
    ends = [0, 21, 39, 76]
    return [all(bool(x[a:b].isfinite().all()) for x in found) for a, b in pairwise(ends)]


def check_operators(rank: int, world_size: int) -> None:
    """torch's own checks of both operators: schema, autograd, fake tensors, tracing."""
    use_backend("interpret")
    q, k, v, do = (torch.randn(1, 5, n, 16, requires_grad=True) for n in (2, 1, 1, 2))
    for starts_q in (None, starts((2, 3))):
        q, k, v, do = (x.detach()[0] if starts_q is not None else x.detach() for x in (q, k, v, do))
        for bias in (None, torch.randn(2, 5, 5)):
            settings = (starts_q, starts_q, 0.25, module.UNLIMITED, 0, None)
            arguments = tuple(x.requires_grad_() for x in (q, k, v))
            given = bias if bias is None else bias.requires_grad_()
            torch.library.opcheck(module.attention_op, (*arguments, *settings, given))
            o, lse = (x.detach() for x in module.attention_op(q, k, v, *settings, given))
            given_back: tuple[Any, ...] = (do, torch.randn_like(lse), q, k, v, o, lse, *settings, bias)
            plain = tuple(x.detach() if isinstance(x, Tensor) else x for x in given_back)
            torch.library.opcheck(module.attention_backward_op, plain)
            if bias is not None:
                torch.library.opcheck(module.attention_bias_backward_op, plain)


def compiled(rank: int, world_size: int) -> tuple[float, list[torch.dtype]]:
    """Largest difference of torch.compile's outputs and gradients from eager ones, and the dtypes of the gradients."""
    use_backend("interpret")
    q, k, v = (torch.randn(2, 9, n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (2, 1, 1))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, lse = attention(q, k, v, scale=0.3, softcap=4.0, window=(4, None), return_lse=True)
        return o.float().square().sum() + lse.sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        value = function(q, k, v)
        results.append([value, *torch.autograd.grad(value, [q, k, v])])
    differences = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return max(differences), [x.dtype for x in results[1][1:]]


def merged(rank: int, world_size: int, cut: int) -> dict[str, float]:
    """Distance of attention over keys in two parts, merged, from attention over all of them, with gradients."""
    use_backend("interpret")
    generator = torch.Generator().manual_seed(cut)
    q, k, v, do = (torch.randn(1, 11, n, 16, generator=generator).requires_grad_() for n in (2, 1, 1, 2))
    window = (None, 2)  # the first queries see nothing of the second part
    whole = attention(q, k, v, causal=False, window=window, return_lse=True)
    # Queries stand beside the last keys: those of a part without the last 11 - cut keys reach so much further right.
    first = attention(q, k[:, :cut], v[:, :cut], causal=False, window=(None, 2 + 11 - cut), return_lse=True)
    second = attention(q, k[:, cut:], v[:, cut:], causal=False, window=window, return_lse=True)
    both = module.merge_attention(*first, *second)
    exact = torch.autograd.grad([*whole], [q, k, v], [do, do[..., 0]], retain_graph=True)
    found = torch.autograd.grad([*both], [q, k, v], [do, do[..., 0]])
    return {name: distance(a, b) for name, a, b in zip(NAMES, (*both, *found), (*whole, *exact), strict=False)}


def run_guarded(rank: int, world_size: int, case: Case) -> None:
    """Every kernel on tensors beside pages that can't be touched: a stray read or write ends the process."""
    q, k, v, do, _, *bias = (x.nan_to_num().to(DTYPES[case.dtype]) for x in inputs(case))
    heads, rows = case.heads[0], q.shape[:-2].numel()
    lse, statistics = torch.zeros(heads, rows), torch.zeros(2, heads, rows)
    options = case.options()
    starts_q, starts_k = options.get("cu_seqlens_q"), options.get("cu_seqlens_k")
    sides = module._window(*case.mask)
    for before in (False, True):

        def guard(x: Any, before: bool = before) -> Any:
            return None if x is None else guarded(x, before)

        def place(x: Tensor) -> Tensor:
            return module.matrix(guard(x))

        with tiles(TILES[case.tiles]):
            inside = (guard(q), guard(k), guard(v), guard(starts_q), guard(starts_k))
            call = module.Call.of(*inside, 0.3, *sides, case.softcap, guard(bias[0]) if bias else None)
            o, do_, found, given = place(do), place(do), guard(lse), guard(statistics)
            call.forward("interpret", o, found).run()
            call.statistics("interpret", o, do_, found, guard(lse), given).run()
            call.dkdv("interpret", do_, given, place(k), place(v)).run()
            call.dq("interpret", do_, given, place(q)).run()
            if bias:
                call.dbias("interpret", do_, given, guard(bias[0])).run()


# Of T = 70 rows; the first are right. Past the end, before the beginning, falling, not from the first row on.
STARTS = [(0, 40, 70), (0, 90, 200), (-50, 20, 70), (0, 60, 10), (40, 50, 70), (0, 1 << 30, 70), (1 << 30, 1 << 30, 70)]
STARTS += [(-(1 << 31), 5, (1 << 31) - 1)]


def run_wrong_starts(rank: int, world_size: int, tile: str) -> None:
    """Forward and backward on guarded tensors with starts that `attention` would refuse on a CPU."""
    use_backend("interpret")
    case = Case("fp32", (32, 32), (2, 1), ((40, 30), (40, 30)), (True, None), None, tile)
    given = [x[:70].float() for x in inputs(case)]
    for numbers, before in itertools.product(zip(STARTS, STARTS[1:] + STARTS[:1], strict=True), (False, True)):
        q, k, v, do, dlse = (guarded(x, before) for x in given)
        starts_q, starts_k = (guarded(torch.tensor(x, dtype=torch.int32), before) for x in numbers)
        for bias in (None, guarded(torch.randn(2, 9, 21), before)):
            settings = (starts_q, starts_k, 0.3, module.UNLIMITED, 0, None, bias)
            with tiles(TILES[tile]):
                o, lse = module.attention_op(q, k, v, *settings)
                module.attention_backward_op(do, dlse.t(), q, k, v, o, lse, *settings)
                if bias is not None:
                    module.attention_bias_backward_op(do, dlse.t(), q, k, v, o, lse, *settings)


@contextmanager
def also_in(folder: str) -> Iterator[None]:
    """Files in folder/kernels and folder/bench are as if they were in kernels/ and megapar/bench/kernels/."""
    added = [(kernels.__path__, f"{folder}/kernels"), (benches.__path__, f"{folder}/bench")]
    for path, more in added:
        path.append(more)
    found = registry.find(kernels.__path__)
    known = (registry.KERNELS, found), (registry.FUNCTIONS, registry.by_function(found.values()))
    try:
        with mock.patch.dict(*known[0]), mock.patch.dict(*known[1]):
            yield
    finally:
        for path, more in added:
            path.remove(more)


def run_howto(rank: int, world_size: int, folder: str) -> tuple[float, float, list[str], list[float], list[float]]:
    """docs/howto/add-a-kernel.md's kernel in bf16 against fp64: largest errors of value and gradient; its specs; of its
    benchmark the bytes forward and backward, and how far its providers' values and gradients are apart."""
    from megapar.bench.run import Point
    from megapar.bench.run import benches as benchmarked

    with also_in(folder):
        assert kernels.select_backends("interpret")["scaled_silu"] == "interpret"
        assert registry.compiled()[-1] == benchmarked()[-1] == "scaled_silu"
        assert "megapar.kernels.scaled_silu" not in sys.modules  # nothing has run it yet
        written = importlib.import_module("megapar.kernels.scaled_silu")
        x = torch.linspace(-4, 4, 1500).to(torch.bfloat16).requires_grad_()
        results = []
        for backend, given in (("interpret", x), ("torch", x.detach().double().requires_grad_())):
            use_backend(backend)
            out = written.scaled_silu(given, 1.5)
            results.append([out, *torch.autograd.grad(out.sum(), given)])
        value, gradient = (distance(a.double(), b) for a, b in zip(*results, strict=True))
        use_backend("interpret")
        torch.library.opcheck(written.scaled_silu_op, (x, 1.5))
        specs = registry.KERNELS["scaled_silu"].specs
        assert specs is not None
        point = Point("scaled_silu", "demo", "fp32", 5)
        work, problem = point.work(), point.problem("cpu")
        ours, plain = (problem.providers[provider]() for provider in ("megapar", "torch"))
        a, b = ours.forward(), plain.forward()
        distances = [
            distance(x.detach(), y.detach()) for x, y in zip(a + ours.backward(a), b + plain.backward(b), strict=True)
        ]
        return value, gradient, list(specs("sm_90")), [work[mode].bytes for mode in ("forward", "backward")], distances


def run_command(rank: int, world_size: int, command: list[str]) -> int:
    """The exit code of a command line."""
    from megapar.cli import main

    return main(command)


def run_providers(rank: int, world_size: int, names: list[str]) -> dict[str, list[float]]:
    """Of every benchmarked kernel: how far ours, interpreted, is from plain torch, in the value and every gradient."""
    from megapar.bench.run import Point

    use_backend("interpret")
    found = {}
    for name in names:
        results = []
        for provider in ("megapar", "torch"):
            torch.manual_seed(0)
            runner = Point(name, "demo", "fp32", 37).problem("cpu").providers[provider]()
            kept = runner.forward()
            gradients = runner.backward(kept)
            results.append([kept[0].clone(), *(gradients if isinstance(gradients, tuple) else (gradients,))])
        found[name] = [distance(a.detach(), b.detach()) for a, b in zip(*results, strict=True)]
    return found
