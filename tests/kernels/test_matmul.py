"""The matrix product and its epilogue: both backends against fp64, and torch's own checks of the operators."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megapar.config.layout import Layout
from megapar.config.schema import TrainConfig
from megapar.kernels import _counters, use_backend, use_tile_scheduler
from megapar.kernels import matmul as matmul_file
from megapar.kernels._common import Launch
from megapar.kernels._counters import Counters, counter_of
from megapar.kernels.matmul import (
    add_matmul,
    add_matmul_op,
    aot_specs,
    config_of,
    empty_matrix,
    launch,
    matmul,
    matmul_into_op,
    matmul_op,
)
from megapar.launch.pool import WorkerPool
from megapar.parallel import cross_entropy
from megapar.train.trainer import Trainer
from tests.kernels.cases import DTYPES, distance, poisoned_memory
from tests.pairwise import pairwise
from tests.tiny import tiny_config

Case = dict[str, Any]
# one element; less than a tile, odd; a tile exactly; several tiles and steps, with more tiles than programs; rows that
# lie apart by a multiple of 16 bytes, which TMA needs, and not
CASES = pairwise(
    {
        "sizes": [(1, 1, 1), (3, 17, 5), (64, 128, 64), (257, 130, 200), (70, 300, 129)],
        "dtype": list(DTYPES),
        "a_transposed": [False, True],
        "b_transposed": [False, True],
        "slices": [False, True],
        "bias": [False, True],
        "activation": [None, "gelu", "relu", "silu"],
        "residual": [False, True],
    }
)
FUNCTIONS = {None: lambda x: x, "gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu}


def given(case: Case) -> dict[str, Tensor]:
    """Operands that the dtype holds, laid out as the case says."""
    M, K, N = case["sizes"]
    generator = torch.Generator().manual_seed(M * K + N)

    def draw(rows: int, columns: int, transposed: bool = False) -> Tensor:
        if transposed:
            return draw(columns, rows).t()
        wider = 3 if case["slices"] else 0
        return torch.randn(rows, columns + wider, generator=generator).to(DTYPES[case["dtype"]])[:, :columns]

    values = {"a": draw(M, K, case["a_transposed"]), "b": draw(K, N, case["b_transposed"]), "residual": draw(M, N)}
    return values | {"bias": draw(1, N)[0], "into": draw(M, N).float()}


def by_torch(case: Case, values: dict[str, Tensor]) -> list[Tensor]:
    product = values["a"] @ values["b"]
    y = FUNCTIONS[case["activation"]](product + values["bias"] if case["bias"] else product)
    y = y + values["residual"] if case["residual"] else y
    widened = product.to(values["into"].dtype)
    return [y, values["into"] + widened, widened]


def errors(rank: int, world_size: int, backend: str, cases: list[Case]) -> list[tuple[Case, str, float, float, float]]:
    """(case, output, error, torch's in the same dtype, largest value), against fp64; the ranks share the cases."""
    use_backend(backend)
    found = []
    for case in cases[rank::world_size]:
        values = given(case)
        with poisoned_memory():
            into, written = values["into"].clone(), torch.full_like(values["into"], torch.nan)
            wide = torch.full((case["sizes"][0], case["sizes"][2] + 5), torch.nan, dtype=DTYPES[case["dtype"]])
            out = wide[:, : case["sizes"][2]] if case["slices"] else None
            y = matmul(
                values["a"], values["b"], activation=case["activation"], out=out,
                bias=values["bias"] if case["bias"] else None,
                residual=values["residual"] if case["residual"] else None,
            )  # fmt: skip
            add_matmul(into, values["a"], values["b"])
            add_matmul(written, values["a"], values["b"], accumulate=False)
        assert y.dtype == DTYPES[case["dtype"]] and (y is out or (out is None and y.is_contiguous()))
        assert wide[:, case["sizes"][2] :].isnan().all()  # beside a slice nothing is written
        plain, exact = by_torch(case, values), by_torch(case, {name: x.double() for name, x in values.items()})
        for name, ours, b, c in zip(("y", "into", "written"), (y, into, written), plain, exact, strict=True):
            found.append((case, name, distance(ours.double(), c), distance(b.double(), c), float(c.abs().max())))
    return found


@pytest.mark.parametrize("backend", ["torch", "interpret"])
def test_against_fp64(backend: str, interpreter: WorkerPool) -> None:
    """An error is at most twice torch's in the same dtype, or the rounding of a sum of 300 in fp32: 32 last bits."""
    found = [row for part in interpreter.run(errors, 2, backend, CASES) for row in part]
    assert len(found) == 3 * len(CASES)
    for case, output, error, plain, size in found:
        assert error <= 2 * plain + 32 * torch.finfo(torch.float32).eps * max(1.0, size), (case, output)


def handed(twice: int | None, never: int | None, launches: list[object]) -> Callable[[Any], Any]:
    """`next_tile`, noted in `launches`; in each of them some tile is handed out twice, or never."""
    right = matmul_file.next_tile

    def draw(counter: Any) -> Any:
        launches.append(counter)
        number = right(counter)
        if twice is not None:
            number -= (number > twice).to(matmul_file.tl.int32)
        return number if never is None else number + (number >= never).to(matmul_file.tl.int32)

    return draw


def results(case: Case, values: dict[str, Tensor]) -> list[Tensor]:
    """As `by_torch`, and a product whose rows may lie apart."""
    into, written = values["into"].clone(), torch.full_like(values["into"], torch.nan)
    with poisoned_memory():
        y = matmul(
            values["a"], values["b"], activation=case["activation"],
            bias=values["bias"] if case["bias"] else None,
            residual=values["residual"] if case["residual"] else None,
        )  # fmt: skip
        add_matmul(into, values["a"], values["b"])
        add_matmul(written, values["a"], values["b"], accumulate=False)
        return [y, into, written, matmul(values["a"], values["b"], aligned=True)]


def by_both_schedulers(
    rank: int, world_size: int, cases: list[Case], twice: int | None = None, never: int | None = None
) -> list[tuple[Case, list[bool], list[float]]]:
    """(case, whether static and dynamic are the same bits, excess of dynamic's errors against fp64 over the bound)."""
    use_backend("interpret")
    found = []
    for case in cases[rank::world_size]:
        values, draws = given(case), list[object]()
        static = results(case, values)
        use_tile_scheduler("dynamic")
        try:
            with mock.patch.object(matmul_file, "next_tile", handed(twice, never, draws)):
                dynamic = results(case, values)
        finally:
            use_tile_scheduler("static")
        assert draws  # not the fixed tiles twice
        exact, excess = by_torch(case, {name: x.double() for name, x in values.items()}), []
        for ours, b, c in zip(dynamic, by_torch(case, values), exact, strict=False):
            bound = 2 * distance(b.double(), c) + 32 * torch.finfo(torch.float32).eps * max(1.0, float(c.abs().max()))
            excess.append(distance(ours.double(), c) - bound)
        found.append((case, [torch.equal(x, y) for x, y in zip(static, dynamic, strict=True)], excess))
    return found


def test_tiles_from_a_counter_make_the_same_bits(interpreter: WorkerPool) -> None:
    """In every layout, with every epilogue, added in place, and with rows apart; the bound is `test_against_fp64`'s."""
    found = [row for part in interpreter.run(by_both_schedulers, 2, CASES) for row in part]
    assert len(found) == len(CASES)
    for case, same, excess in found:
        assert all(same) and len(excess) == 3 and max(excess) <= 0, (case, same, excess)


@pytest.mark.parametrize(
    ("wrong", "different"),
    [((None, None), [False] * 4), ((1, None), [False, True, False, False]), ((None, 1), [True] * 4)],
)
def test_a_tile_handed_out_twice_or_never_is_seen(
    wrong: tuple[int | None, int | None], different: list[bool], interpreter: WorkerPool
) -> None:
    """Twice: it is added twice. Never: poison stays, or what was there."""
    cases = [case for case in CASES if case["sizes"] == (257, 130, 200)][:1]
    for _, same, _ in interpreter.run(by_both_schedulers, 1, cases, *wrong)[0]:
        assert [not one for one in same] == different


def draws_of_launches(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """(tiles that others had had before, tiles that were written, counter after) of launches of 6 tiles."""
    use_backend("interpret")
    a, b, counter = torch.ones(257, 64), torch.ones(64, 200), torch.zeros(4, dtype=torch.int32)
    found = []
    for had, programs in ((0, 1), (0, 3), (5, 3), (0, 40), (6, 3), (0, 3)):
        out = torch.zeros(257, 200)
        one = replace(launch("interpret", a, b, out, counter=counter), grid=(programs,))
        counter[0] = had  # as if other programs had drawn these, and were still at work
        one.run()
        shape = (one.arguments["ROWS"], one.arguments["COLUMNS"])
        written = sum(int(part.all()) for rows in out.split(shape[0]) for part in rows.split(shape[1], 1))
        found.append((had, written, int(counter[0])))
    return found


def test_a_counter_is_left_as_it_was_found(interpreter: WorkerPool) -> None:
    """With fewer programs than tiles, with more, and with programs that start when no tile is left."""
    found = interpreter.run(draws_of_launches, 1)[0]
    tiles = found[0][1]
    assert tiles == 6 and found == [(had, max(0, tiles - had), 0) for had, _, _ in found]


def test_launches_that_may_run_at_once_share_no_counter() -> None:
    """A stream has its own, and so has every launch in a graph. None are left: fixed tiles."""
    counters = Counters(torch.device("cpu"), 5)
    first, again, other = (counters.take(stream, False) for stream in (7, 7, 8))
    captured = [counters.take(7, True) for _ in range(3)]
    taken = [x.data_ptr() for x in (first, other, *captured) if x is not None]
    assert again is first and len(set(taken)) == 5 and all(pointer % 16 == taken[0] % 16 for pointer in taken)
    assert counters.take(7, True) is None and counters.take(9, False) is None
    assert counters.take(8, False) is other


def counter_on_a_gpu(stream: int, captured: bool) -> Tensor | None:
    """What a launch on a GPU would be given; the GPU is not there."""
    out: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    with (
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: captured),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: stream, create=True),
        mock.patch.object(_counters, "Counters", lambda device: Counters(torch.device("cpu"), 3)),
    ):
        return counter_of(out)


def test_a_capture_finds_counters_or_takes_fixed_tiles() -> None:
    """Memory that is zeros before a replay can't be made in a capture."""
    with mock.patch.dict(_counters._of_device, clear=True), mock.patch("megapar.kernels._tile_scheduler", "dynamic"):
        assert counter_on_a_gpu(7, captured=True) is None
        eager = counter_on_a_gpu(7, captured=False)
        captured = counter_on_a_gpu(7, captured=True)
        assert eager is not None and captured is not None and eager.data_ptr() != captured.data_ptr()
        assert counter_on_a_gpu(7, captured=False) is eager
        with mock.patch("megapar.kernels._tile_scheduler", "static"):
            assert counter_on_a_gpu(7, captured=False) is None


def check_operators(rank: int, world_size: int) -> None:
    use_backend("interpret")
    a, b, bias, residual = torch.randn(3, 5), torch.randn(5, 4), torch.randn(4), torch.randn(3, 4)
    torch.library.opcheck(matmul_op, (a, b, bias, "gelu", residual, False))
    torch.library.opcheck(matmul_op, (a, torch.randn(5, 7), None, None, None, True))
    for accumulate in (True, False):
        torch.library.opcheck(add_matmul_op, (residual, a, b, accumulate))
    torch.library.opcheck(matmul_into_op, (torch.empty(3, 4), a, b, bias, "gelu", residual))
    compiled = torch.compile(matmul, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(a, b, bias=bias), matmul(a, b, bias=bias))
    out = residual.clone()
    assert torch.equal(compiled(a, b, residual=out, out=out), matmul(a, b, residual=residual))
    columns = torch.zeros(4, 3).t()  # lie together
    add_matmul(columns, a, b)
    assert torch.equal(columns, matmul(a, b))
    with pytest.raises(RuntimeError, match="autograd"):  # gradients are the owner's: never silently none
        matmul(a.requires_grad_(), b).sum().backward()


def test_operators_pass_torchs_checks(interpreter: WorkerPool) -> None:
    interpreter.run(check_operators, 1, timeout=300)


def products_of_logits(rank: int, world_size: int) -> list[tuple[int, str, tuple[int, ...], float]]:
    """(columns, what, strides, error in roundings of bf16) of a product and of both gradients made from it."""
    use_backend("interpret")
    found = []
    for columns in (1, 8, 57, 64, 300):
        generator = torch.Generator().manual_seed(columns)
        x, w, dy = (
            torch.randn(n, m, generator=generator).bfloat16() for n, m in ((20, 48), (columns, 48), (20, columns))
        )
        with poisoned_memory():
            y = matmul(x, w.t(), aligned=True)
            found.append((columns, "y", y.stride(), rounded(y, x.double() @ w.double().t())))
            y.copy_(dy)  # its gradient takes its place
            found.append((columns, "dx", y.stride(), rounded(matmul(y, w), dy.double() @ w.double())))
            into = torch.zeros(w.shape)
            add_matmul(into, y.t(), x)
            exact = dy.double().t() @ x.double()
            found.append(
                (columns, "dw", y.stride(), float((into - exact).abs().max() / exact.abs().max()) * 2**-8 / 1e-6)
            )
    return found


def rounded(y: Tensor, exact: Tensor) -> float:
    return float(((y.double() - exact).abs() / (exact.abs() + 1e-3)).max()) / 2**-8


def test_a_result_whose_rows_lie_apart(interpreter: WorkerPool) -> None:
    """It is the product, and so are those that are made from it. Rows that TMA takes as they are stay together."""
    for columns, what, strides, error in interpreter.run(products_of_logits, 1)[0]:
        wide = {1: 64, 8: 8, 57: 64, 64: 64, 300: 320}[columns]
        assert strides == (wide, 1) and error <= 1, (columns, what, strides, error)


def test_in_torch_rows_stay_together() -> None:
    assert matmul(torch.ones(3, 4), torch.ones(4, 5), aligned=True).is_contiguous()
    assert empty_matrix(torch.ones(3, 4), 3, 5).is_contiguous()


def test_gpt2s_logits_pass_by_tma() -> None:
    """Written and read as tiles; of rows that are not aligned through addresses."""
    launches = aot_specs("sm_90")
    forward, input_grad, weight_grad = (
        launches[f"matmul_logits{kind}_50257"] for kind in ("", "_input_grad", "_weight_grad")
    )
    assert forward.arguments["out_tiles"] and input_grad.arguments["a_tiles"] and weight_grad.arguments["a_tiles"]
    together = torch.empty(4096, 50257, dtype=torch.bfloat16, device="meta")
    x, w = (torch.empty(n, 768, dtype=torch.bfloat16, device="meta") for n in (4096, 50257))
    assert launch("sm_90", x, w.t(), together).arguments["out_tiles"] is None
    assert launch("sm_90", together, w, x).arguments["a_tiles"] is None


def logits_of_a_step(rank: int, world_size: int, config: TrainConfig) -> list[str]:
    """How the logits lie where their loss is computed, and which products of a step met what TMA can't take."""
    found: set[str] = set()
    statistics, run = cross_entropy.cross_entropy_statistics, Launch.run

    def seen(logits: Tensor, *rest: Any, **options: Any) -> Tensor:
        found.add(f"logits {list(logits.shape)}, {logits.stride()}")
        return statistics(logits, *rest, **options)

    def launched(one: Launch) -> None:
        given = one.arguments
        if one.kernel.fn.__name__ == "matmul_kernel":
            found.update(
                f"{name} {list(given[name].shape)}" for name in ("a", "b", "out") if given[f"{name}_tiles"] is None
            )
        run(one)

    with mock.patch.object(cross_entropy, "cross_entropy_statistics", seen), mock.patch.object(Launch, "run", launched):
        trainer = Trainer(config, rank)
        trainer.step(1)
        trainer.close()
    return sorted(found)


@pytest.mark.parametrize("layout", ["single", "tp2"])
def test_a_models_logits_pass_by_tma(layout: str, interpreter: WorkerPool, tokens: str) -> None:
    """A vocabulary of 61: no shard of it has rows of a multiple of 16 bytes."""
    values = {"kernels.backend": "interpret", "train.dtype": "bf16", "train.global_batch_size": 2, "model.layers": 1}
    for rank, found in enumerate(
        interpreter.run(logits_of_a_step, Layout.parse(layout).world, tiny_config(tokens, layout, **values))
    ):
        columns = 61 if layout == "single" else (30, 31)[rank]
        assert found == [f"logits [16, {columns}], (64, 1)"]


def trained(rank: int, world_size: int, config: TrainConfig) -> tuple[list[Tensor], set[bool]]:
    """Weights and gradients after a step, and whether its matmuls had a counter."""
    counted, run = set(), Launch.run

    def launched(one: Launch) -> None:
        if one.kernel.fn.__name__ == "matmul_kernel":
            counted.add(one.arguments["counter"] is not None)
        run(one)

    with mock.patch.object(Launch, "run", launched):
        trainer = Trainer(config, rank)
        trainer.step(1)
        left = [x.clone() for x in (*trainer.buffers.params, *trainer.buffers.grads)]
        trainer.close()
    return left, counted


def test_a_step_with_tiles_from_counters_has_the_same_bits(interpreter: WorkerPool, tokens: str) -> None:
    values: dict[str, Any] = {"kernels.backend": "interpret", "train.dtype": "fp32", "train.global_batch_size": 2}
    found = {}
    for scheduler in ("dynamic", "static"):
        config = tiny_config(tokens, **values | {"model.layers": 1, "kernels.tile_scheduler": scheduler})
        [(found[scheduler], counted)] = interpreter.run(trained, 1, config)
        assert counted == {scheduler == "dynamic"}
    assert all(torch.equal(x, y) for x, y in zip(*found.values(), strict=True))


def test_a_tile_for_every_processor() -> None:
    large, middle, small = (
        config_of("sm_90", torch.bfloat16, M, N, 132) for M, N in ((8192, 4096), (4096, 768), (9, 9))
    )
    assert [(c.rows, c.columns) for c in (large, middle, small)] == [(128, 256), (128, 128), (64, 128)]
    assert config_of("sm_86", torch.bfloat16, 8192, 8192, 84) == config_of("sm_80", torch.bfloat16, 8192, 8192, 84)


def test_an_output_apart_from_the_inputs() -> None:
    """Tiles are written while others are still to be read. A residual is read where it is written: it may be out."""
    memory = torch.randn(40, 4)
    square, below, overlapping = memory[:4], memory[4:8], memory[2:6]
    for a, b in ((square, below), (below, square.t())):
        for out in (square, overlapping):
            with pytest.raises(ValueError, match=r"out shares memory with [ab]"):
                matmul(a, b, out=out)
    with pytest.raises(ValueError, match="out shares memory with bias"):
        matmul(square, below, bias=memory[8], out=memory[8:12])
    with pytest.raises(ValueError, match="out shares memory with residual"):
        matmul(square, below, residual=memory[9:13], out=memory[8:12])
    with pytest.raises(ValueError, match="into shares memory with b"):
        add_matmul(below, square, below)
    expected = memory[8:12] + square @ below
    assert torch.equal(matmul(square, below, residual=memory[8:12], out=memory[8:12]), expected)
    wide = torch.randn(4, 8)  # beside each other, in the same rows
    expected = wide[:, :4] @ square
    assert torch.equal(matmul(wide[:, :4], square, out=wide[:, 4:]), expected)


def test_contradictions_are_refused() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"^kernels.tile_scheduler=fast: use one of static, dynamic$"):
        use_tile_scheduler("fast")
    for bad in ((a, b.t()), (a, b.double()), (a[0], b), (a.int(), b.int())):
        with pytest.raises(ValueError, match=r"need \[M, K\] and \[K, N\] of one floating dtype"):
            matmul(*bad)
    with pytest.raises(ValueError, match="memory for every element"):
        matmul(torch.ones(7, 4), torch.ones(4, 3), out=torch.zeros(1, 3).expand(7, 3))
    with pytest.raises(ValueError, match="rows that lie together"):
        matmul(a, b, out=torch.zeros(4, 2).t())
    with pytest.raises(ValueError, match=r"need .* of one floating dtype"):
        add_matmul(torch.zeros(2, 4, dtype=torch.int32), a.int(), b.int())
    with pytest.raises(ValueError, match=r"out \[4, 2\].*need \[2, 4\]"):
        matmul(a, b, out=torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"bias \[3\].*need \[4\]"):
        matmul(a, b, bias=torch.zeros(3))
    with pytest.raises(ValueError, match=r"residual \[2, 3\].*need \[2, 4\]"):
        matmul(a, b, residual=a)
    with pytest.raises(ValueError, match="gelu, relu, silu"):
        matmul(a, b, activation="tanh")
    with pytest.raises(ValueError, match=r"into .*float16.* need \[2, 4\] in torch.float32"):
        add_matmul(torch.zeros(2, 4, dtype=torch.float16), a, b)
