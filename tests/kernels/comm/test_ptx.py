"""The order of memory in what the compiler makes of kernels/comm, for GPUs that are not here, on every path through it.

PTX ISA, "Memory Consistency Model": threads store, and meet at their barrier (bar.sync); one of them then sets a flag
by a release at the scope of the system. A thread that reads the flag by an acquire at that scope sees what was stored,
and after its barrier so do the threads beside it. TMA reads by a proxy of its own, which a fence brings up to date.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from unittest import mock

import pytest
import torch

from megapar.inspect.compile import Spec, spec_of
from megapar.kernels import matmul as plain
from megapar.kernels._common import Launch
from megapar.kernels.comm import exchange, matmul
from tests.kernels.comm.ptx import (
    Block,
    blocks_of,
    compiled,
    count,
    innermost_loop,
    is_mma,
    is_tma_load,
    marks,
    starts_with,
)

TARGETS = ("sm_80", "sm_90", "sm_100")
LAUNCHES = {
    (target, name): launch
    for target in TARGETS
    for module in (exchange, matmul)
    for name, launch in module.aot_specs(target).items()
}
FUSED = [key for key, launch in LAUNCHES.items() if "product" in launch.kernel.fn.__name__]
READS_PEERS = ("reduce_kernel", "collect_kernel", "gathered_product_kernel")  # the others store to them


def plain_product(target: str, launch: Launch) -> Spec:
    """The matmul of a fused launch without its collective, in the same tiles."""
    a, b, given = launch.arguments["a"], launch.arguments["b"], launch.arguments
    tile = (given["ROWS"], given["COLUMNS"], given["STEP"], launch.warps, launch.stages, given["a_tiles"] is not None)
    config = plain.Config(*tile, quarters=given["QUARTERS"])
    with mock.patch.dict(plain.CONFIGS, {(target, a.dtype.itemsize): (config,)}):
        out = torch.empty(len(a), b.shape[1], dtype=a.dtype, device="meta")
        return spec_of("plain", plain.launch(target, a, b, out), target)


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def texts(compiler: ProcessPoolExecutor) -> dict[tuple[str, str], str]:
    """PTX of every launch by target and name, and of the plain product beside a fused one, as ".. plain"."""
    started: dict[tuple[str, str], Future[str]] = {}
    for (target, name), launch in LAUNCHES.items():
        started[target, name] = compiler.submit(compiled, spec_of(name, launch, target))
        if (target, name) in FUSED:
            started[target, f"{name} plain"] = compiler.submit(compiled, plain_product(target, launch))
    return {key: future.result() for key, future in started.items()}


def change(opcode: str, before: frozenset[str]) -> frozenset[str]:
    """Marks. stored, polled: since a barrier; seen: some flag, ever; unfenced: for TMA, since a flag was seen."""
    if opcode.startswith("st.global"):
        return before | {"stored"}
    if opcode.startswith("bar.sync"):
        return before - {"stored", "polled"}
    if opcode.startswith("ld.global.sys.acquire"):
        return before | {"polled", "seen", "unfenced"}
    if opcode == "fence.proxy.async.global" and "polled" not in before:
        return before - {"unfenced"}
    return before


def complaints(kernel: str, text: str) -> list[str]:
    """What is wrong with the order of memory in a kernel's code."""
    found = []
    for opcode, states in marks(blocks_of(text), change):
        is_load = opcode.startswith(("ld.global.v", "cp.async.c", "cp.async.bulk.tensor"))
        touches_peers = opcode.startswith("st.global") if kernel not in READS_PEERS else is_load
        if ".exch" in opcode:
            if opcode != "atom.global.sys.release.exch.b64":
                found.append(f"a flag is set by {opcode}")
            if any("stored" in state for state in states):
                found.append("a flag is set between stores and the barrier")
        if touches_peers and not all("seen" in state for state in states):
            found.append(f"{opcode} before any flag was seen")
        if touches_peers and any("polled" in state for state in states):
            found.append(f"{opcode} between a poll and the barrier")
        if kernel == "gathered_product_kernel" and is_tma_load(opcode) and any("unfenced" in one for one in states):
            found.append("TMA without a fence after the poll")
        if opcode.startswith("ld.global.nc"):
            found.append("a load that may be from a cache which no flag brings up to date")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("target, name", LAUNCHES)
def test_order_of_memory(target: str, name: str, texts: dict[tuple[str, str], str]) -> None:
    """And as many bits of each store as a thread can store at once: rows are multiples of 16 bytes here."""
    text, kernel = texts[target, name], LAUNCHES[target, name].kernel.fn.__name__
    opcodes = {opcode for block in blocks_of(text) for opcode in block.opcodes}
    assert complaints(kernel, text) == []
    assert {opcode for opcode in opcodes if opcode.startswith("st.global")} == {"st.global.v4.b32"}
    tells = kernel in ("push_kernel", "product_push_kernel") or (kernel == "reduce_kernel" and "owner" in name)
    assert ("atom.global.sys.release.exch.b64" in opcodes) == tells
    assert "ld.global.sys.acquire.b64" in opcodes


@pytest.mark.slow
@pytest.mark.parametrize("target, name", FUSED)
def test_loop_over_k_is_that_of_the_plain_matmul(target: str, name: str, texts: dict[tuple[str, str], str]) -> None:
    """Nothing is polled or told in it, and it has no more of anything than the plain one, of which the loop over tiles
    is a part: so that one also has the arithmetic of the next tile's addresses, and the epilogue behind a branch."""
    fused, alone = (innermost_loop(blocks_of(texts[target, key]), is_mma) for key in (name, f"{name} plain"))
    assert not [opcode for opcode in fused if ".sys" in opcode or opcode.startswith("atom")]
    assert count(fused, is_mma) == count(alone, is_mma)
    assert (
        count(fused, is_tma_load) == count(alone, is_tma_load) == (2 if "192" not in name and target != "sm_80" else 0)
    )
    for kinds in (("ldmatrix", "ld.shared"), ("cp.async.c",), ("bar.sync",), ("st.shared",)):
        assert count(fused, starts_with(*kinds)) <= count(alone, starts_with(*kinds)), kinds
    assert fused.total() <= alone.total()


SYMMETRIC = "megapar.kernels.comm.symmetric"
RELAXED_POST = (SYMMETRIC, "post", 'sem="release"', 'sem="relaxed"')
RELAXED_POLL = (SYMMETRIC, "await_epoch", 'sem="acquire"', 'sem="relaxed"')
MUTANTS = {
    "push without a barrier": (
        "push_to_all", ("megapar.kernels.comm.exchange", "push_kernel", "tl.debug_barrier()", "pass"), "between stores",
    ),
    "reduce without a barrier": (
        "reduce_to_owner", ("megapar.kernels.comm.exchange", "reduce_kernel", "tl.debug_barrier()", "pass"),
        "between stores",
    ),
    "product without a barrier": (
        "product_push_to_owner_1792",
        ("megapar.kernels.comm.matmul", "product_push_kernel", "tl.debug_barrier()", "pass"), "between stores",
    ),
    "a flag set without release": ("push_to_owner", RELAXED_POST, "is set by"),
    "a flag at the scope of the GPU": ("push_to_all", (SYMMETRIC, "post", 'scope="sys"', 'scope="gpu"'), "is set by"),
    "a poll without acquire": ("reduce_to_all", RELAXED_POLL, "before any flag"),
    "a poll of collect without acquire": ("collect", RELAXED_POLL, "before any flag"),
    "a poll of begin without acquire": ("push_to_all", RELAXED_POLL, "before any flag"),
    "a poll at the scope of the GPU": (
        "gathered_product_1792", (SYMMETRIC, "await_epoch", 'scope="sys"', 'scope="gpu"'), "before any flag",
    ),
    "TMA without a fence": (
        "gathered_product_1792", ("megapar.kernels.comm.matmul", "gathered_product_kernel", "fence_tma()", "pass"),
        "TMA without",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_mutants(name: str, compiler: ProcessPoolExecutor) -> None:
    launch_name, edit, shows = MUTANTS[name]
    launch = LAUNCHES["sm_90", launch_name]
    text = compiler.submit(compiled, spec_of(launch_name, launch, "sm_90"), (edit,)).result()
    assert any(shows in complaint for complaint in complaints(launch.kernel.fn.__name__, text))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reduce_to_all", "collect", "gathered_product_1792", "push_to_all"])
def test_no_barrier_after_a_poll(name: str, texts: dict[tuple[str, str], str]) -> None:
    """Triton itself puts it there, so only the code can be without."""
    kernel, text = LAUNCHES["sm_90", name].kernel.fn.__name__, texts["sm_90", name].replace("bar.sync", "bar.arrive")
    assert any("between a poll" in complaint for complaint in complaints(kernel, text))


def test_marks_by_every_path() -> None:
    """Of two ways to a store, a flag was seen on one."""
    poll, store = Block(["ld.global.sys.acquire.b64"], [3]), Block(["st.global.b32"])
    fork = [Block([], [1, 2]), poll, Block([], [3]), store]
    assert dict(marks(fork, change))["st.global.b32"] == {frozenset(), frozenset({"polled", "seen", "unfenced"})}


def test_a_poll_in_the_loop_is_found() -> None:
    blocks = [Block(["mov"], [1]), Block(["wgmma.mma_async.x", "ld.global.sys.acquire.b64"], [1, 2]), Block(["ret"])]
    assert innermost_loop(blocks, is_mma)["ld.global.sys.acquire.b64"] == 1
